"""Write the README's generated tables anew: the features, the settings.

    make docs

Each stands between ``<!-- name -->`` and ``<!-- /name -->``; tests check that they are true.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dataflows import settings  # noqa: E402
from features.fraud import FRAUD  # noqa: E402


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in {"features": FRAUD.table(), "settings": settings.table()}.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
