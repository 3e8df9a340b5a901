"""The journey shows that the pieces fit and what each step costs; it claims nothing."""


def claims(rows: list[dict]) -> list[dict]:  # noqa: ARG001
    """No claims."""
    return []
