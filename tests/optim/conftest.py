"""Lets the tests of this room import the laws that they share."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("laws")
sys.path.insert(0, str(Path(__file__).parent))
