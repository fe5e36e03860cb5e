"""`python -m tests.deploy` writes the files of deploy/ that follow from others there."""

from tests.deploy.generated import GENERATED

for path, content in GENERATED.items():
    path.write_text(content(), encoding="utf-8")
