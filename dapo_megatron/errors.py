"""The two ways a command can fail, and the exit code of each."""


class RequestError(Exception):
    """The request is wrong: bad setting, missing file, sizes that do not divide. Printed as is, exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The request was sound and something failed while it ran. Printed as is, exit code 1."""

    exit_code = 1
