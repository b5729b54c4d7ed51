"""The planners of two papers, AdaPtis and Mist: they predict the drafts that they change."""
