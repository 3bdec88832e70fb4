"""`python -m tests.golden.write`: the files of cases that have none yet. What is there stays as it is:
messages of a version that was once released must be readable for ever."""

from __future__ import annotations

import sys

from gck.message import VERSION
from tests.golden.cases import CASES, HERE, dense, message


def main() -> int:
    folder = HERE / f"v{VERSION}"
    folder.mkdir(exist_ok=True)
    changed = []
    for name in CASES:
        for suffix, made in ((".bin", message(name)), (".f32", dense(name))):
            path = folder / (name + suffix)
            if not path.exists():
                path.write_bytes(made)
                print("wrote", path)
            elif path.read_bytes() != made:
                changed.append(path.name)
    if changed:
        print(f"not overwritten, though they differ from what gck now writes: {', '.join(changed)}")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
