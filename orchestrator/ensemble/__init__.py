"""Seven models as one: members, their training, their scores, the table."""
