"""Errors by which a rank ends though it has made no mistake itself."""


class PeerError(RuntimeError):
    """Another rank failed, and that rank prints its own message."""


class Preempted(Exception):
    """The run was told to stop, and has stopped. The message says what was saved and how to continue."""
