"""`python -m tests.docs` writes the generated parts of README.md."""

from tests.docs.tables import README, with_task_table

README.write_text(with_task_table(README.read_text()))
