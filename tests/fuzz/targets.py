"""One function per reader: it feeds bytes to the real reader and lets nothing pass but the errors that a user may see.

Every other exception, a hang and an allocation beyond what the bytes hold are findings. Knows no fuzzer.
"""

from tests.fuzz import target_files, target_texts
from tests.fuzz.target import TARGETS
from tests.fuzz.target_texts import MANIFEST

__all__ = ["MANIFEST", "TARGETS", "target_files", "target_texts"]
