"""The one exception that the command line turns into a sentence."""


class UserError(Exception):
    """Something the user can put right. Its text is one sentence, shown alone on stderr with exit code 2."""


class MethodError(UserError):
    """What was asked for goes with other methods than this one."""


def first_sentence(error: BaseException) -> str:
    """Return the first non-empty line of an error of another library, for use inside a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
