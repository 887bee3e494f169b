"""How often what dies is started again, and how soon."""

from rlhf_ray.errors import BudgetExhausted

MOST_RESTARTS = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class RestartBudget:
    """Restarts by name since the last progress: each waits twice as long as the one before, and the last one is given.

    What dies again and again without any progress in between has a cause that another start does not mend.
    """

    def __init__(self) -> None:
        self._spent: dict[str, int] = {}

    def spend(self, name: str, cause: Exception) -> float:
        """Take one restart of `name`; the seconds to wait before it, none before the first.

        Raises:
            BudgetExhausted: it was restarted as often as it may be.
        """
        spent = self._spent.get(name, 0)
        if spent >= MOST_RESTARTS:
            raise BudgetExhausted(
                f"{cause}\n{name} was restarted {spent} times without any progress in between, and another time would "
                "end alike. Mend the cause; the same command then continues the run"
            )
        self._spent[name] = spent + 1
        return min(FIRST_PAUSE_S * 2 ** (spent - 1), LONGEST_PAUSE_S) if spent else 0.0

    def renew(self) -> None:
        """There was progress: all may be spent again."""
        self._spent.clear()
