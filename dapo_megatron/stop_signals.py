"""The signals that ask a rank to stop, from its first moment on; no torch.

SIGTERM and SIGINT come to ranks alone. SIGUSR1, slurm's notice before a time limit, comes to every process of a job
step: it is held back from the start, which child processes inherit, and looked for between steps.
"""

import signal

NOTICE = signal.SIGUSR1  # a time limit is near
CAUGHT = (signal.SIGTERM, signal.SIGINT)


def hold_notice() -> None:
    """From here on SIGUSR1 ends neither this process nor one that it starts; call it before libraries start threads."""
    if signal.getsignal(NOTICE) in (signal.SIG_DFL, signal.SIG_IGN, None):
        signal.signal(NOTICE, lambda *_: None)  # what is ignored is not held back either, but lost
    signal.pthread_sigmask(signal.SIG_BLOCK, {NOTICE})


def notice_came() -> bool:
    """Whether SIGUSR1 has come to this process since `hold_notice`."""
    return NOTICE in signal.sigpending()
