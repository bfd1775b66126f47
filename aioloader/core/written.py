"""Where the user writes the arguments of a stage, so that advice can name the call."""

from dataclasses import dataclass

__all__ = ["Written"]


@dataclass(frozen=True, eq=False)  # two that read alike are two calls
class Written:
    """The call in the user's program that says how many calls a stage has at once.

    Attributes:
        call: The call as it is written, up to where arguments are added: `.map(fetch`.
        width: The argument that says how many calls there are at once.
        room: The argument that says how much the stage's window holds; None: there is none.
        of_loader: It makes the loader, and is not about one of its stages.
    """

    call: str
    width: str = "concurrency"
    room: str | None = None
    of_loader: bool = False

    def __call__(self, arguments: str) -> str:
        """With these arguments."""
        return f"{self.call}, {arguments})"
