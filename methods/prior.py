"""The prior itself, with which every method is compared."""

from collections.abc import Iterator

from bench import Batch, Core, Loss, Method, Needs


class Prior(Method):
    """The pretrained model, unchanged."""

    needs = Needs(training=False)

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Nothing to train."""
        return iter(())
