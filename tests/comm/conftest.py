"""Lets the tests of this room import the exchanges that they share."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("exchanges", "walks")
sys.path.insert(0, str(Path(__file__).parent))
