"""The colours of tasks: a hue for each kind, lighter for the later stages of a device.

The hues are those that Okabe and Ito chose so that colour-blind people tell them apart (Color
Universal Design, 2008).
"""

KIND_WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
KIND_COLORS = {"F": "#0072b2", "B": "#d55e00", "I": "#e69f00", "W": "#009e73"}

_LIGHTEST = 0.6  # of the way to white; beyond it hues are hard to tell apart


def shade(kind: str, chunk: int, num_chunks: int) -> str:
    """Return the colour of a task of a device's `chunk`-th stage out of `num_chunks`.

    >>> shade("F", 0, 2), shade("F", 1, 2)
    ('#0072b2', '#99c7e0')
    """
    part = _LIGHTEST * chunk / max(1, num_chunks - 1)
    mixed = (round(each + (255 - each) * part) for each in _channels(KIND_COLORS[kind]))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def ink(color: str) -> str:
    """Return the colour for text on `color`: black, or white where black has less contrast.

    >>> ink("#0072b2"), ink("#e69f00")
    ('#ffffff', '#000000')
    """
    linear = [(each / 255) ** 2.2 for each in _channels(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Contrast as in WCAG 2: (lighter + 0.05) / (darker + 0.05), of white above, of black below.
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
