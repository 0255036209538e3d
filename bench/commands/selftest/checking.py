"""What a check may raise."""


class Failed(Exception):
    """The plugin breaks its contract; the message says how."""


class Skipped(Exception):
    """The check does not apply to this plugin; the message says why."""


def require(condition: object, message: str) -> None:
    """Raise Failed with the message unless the condition holds."""
    if not bool(condition):
        raise Failed(message)
