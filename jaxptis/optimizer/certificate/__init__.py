"""What holds for every plan: how short a step can be, and whether the layers fit at all."""

from jaxptis.optimizer.certificate.certificate import Bound, Certificate, certify

__all__ = ["Bound", "Certificate", "certify"]
