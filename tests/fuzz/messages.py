"""Coverage-guided fuzzing of `gck.from_bytes`: `make fuzz`, or

    python -m tests.fuzz.messages tests/fuzz/corpus/messages tests/golden/v1 -max_total_time=300

(libFuzzer's options; the first folder gets what reaches something new). Needs atheris: `pip install atheris`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["gck.message", "gck.coded_layout", "gck.wire", "gck.payload"]):
    import gck.message  # noqa: F401

from tests.message.hostile import check, sealed


def test_one_input(data: bytes) -> None:
    # With the right checksum, which no fuzzer finds: else all would end there.
    check(sealed(data))


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
