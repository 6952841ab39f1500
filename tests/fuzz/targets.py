"""All targets."""

from tests.fuzz import models as models
from tests.fuzz import tables as tables
from tests.fuzz import tracking as tracking
from tests.fuzz.target import TARGETS as TARGETS
