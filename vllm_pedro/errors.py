"""The errors this package raises on purpose, so that callers can tell them from bugs."""


class PedroError(ValueError):
    """A setting, a model or a request that PEDRO cannot serve; the message says what to change."""


class AdapterError(PedroError):
    """An adapter folder that is missing, broken, or made for another backbone."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
