"""Metrics of fusedhead for the loggers of a training program.

    from fusedhead.integrations import Watch
    watch = Watch()                                       # observes every graph from now on
    run.log(watch.metrics(), step=step)                   # wandb
    add_to_tensorboard(writer, watch.metrics(), step)     # torch.utils.tensorboard
    mlflow.log_metrics(watch.metrics(), step=step)

    trainer.add_callback(fusedhead.integrations.transformers.FusedHeadCallback(trainer))
    lightning.Trainer(callbacks=[fusedhead.integrations.lightning.FusedHeadCallback()])

The callbacks log through the trainer's own loggers when a number has changed. A framework is imported only with the
module of its name, and none is a dependency.
"""

from fusedhead.integrations.metrics import Watch, add_to_tensorboard

__all__ = ["Watch", "add_to_tensorboard"]
