"""Write the README's generated tables anew: the features, the settings.

    python docs/readme_tables.py

Each stands between ``<!-- name -->`` and ``<!-- /name -->``.
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
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=block: new, text, flags=re.S
        )
    readme.write_text(text)


if __name__ == "__main__":
    main()
