"""Compare editors fairly: the same records, the same model, the same scoring for every method."""

from .. import testbed as testbed  # it brings the shipped model
