"""The prior itself: the row that every other row is compared with."""

from collections.abc import Iterator

from bench import Batch, Core, Loss, Method, Needs


class Prior(Method):
    """The pretrained model, unchanged."""

    needs = Needs(training=False)

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Nothing to train."""
        return iter(())
