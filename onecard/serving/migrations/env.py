"""How alembic runs migrations: in the transaction that serving/schema.py began, so all of them or none."""

from alembic import context

from onecard.serving.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
