"""What fuzzing has found of interest, once more. (The decoders' part is replayed by `make sanitize`.)"""

from __future__ import annotations

from pathlib import Path

from tests.message.hostile import check, sealed

CORPUS = Path(__file__).parent / "corpus"


def test_messages() -> None:
    files = sorted((CORPUS / "messages").iterdir())
    accepted = [check(sealed(path.read_bytes())) for path in files]
    assert 0 < sum(accepted) < len(accepted)


def test_the_corpora_are_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000
