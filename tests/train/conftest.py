"""What the tests of training share: trainers that start again and keep their compiled graphs."""

from collections.abc import Callable

import pytest
from mindspore import Tensor

from glm3kit.train.optimizer import LossScale
from glm3kit.train.trainer import Trainer


@pytest.fixture(scope="session")
def restartable() -> Callable[[Trainer], Callable[..., Trainer]]:
    """Remember how a trainer is now; what it gives sets the trainer back to that, with changes of its settings."""
    def remember(trainer: Trainer) -> Callable[..., Trainer]:
        parameters = [*trainer.net.get_parameters(), *trainer.optimizer.state()]
        values, config, total_steps = [p.asnumpy().copy() for p in parameters], trainer.config, trainer.total_steps

        def restart(total_steps: int = total_steps, **changes) -> Trainer:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(Tensor(value))
            trainer.net.after_update()
            trainer.config, trainer.total_steps, trainer.step = config.model_copy(update=changes), total_steps, 0
            trainer.scale = LossScale(trainer.config.loss_scale)
            return trainer

        return restart

    return remember
