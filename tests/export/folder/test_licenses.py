"""License identifiers: those of the Hub, the nearest ones for others."""

import pytest

from maskwise.errors import UserError
from maskwise.export.folder import licenses


def test_licenses_are_those_of_the_hub():
    for name in ("mit", "apache-2.0", "cc-by-nc-4.0", "other", "unknown", "openrail++"):
        licenses.check(name)
    nearest = {"Apache 2.0": "apache-2.0", "apache": "apache-2.0", "MIT License": "mit", "CC-BY-NC-4": "cc-by-nc-4.0"}
    for given, name in {**nearest, "gpl3": "gpl-3.0", "bsd3": "bsd-3-clause"}.items():
        with pytest.raises(UserError, match="no license identifier of the Hub") as caught:
            licenses.check(given)
        assert name in str(caught.value), str(caught.value)
