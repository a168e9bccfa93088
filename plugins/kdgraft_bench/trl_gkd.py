"""TRL's own distillation of language models, as a reference."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kdgraft import DistillError


def trl_gkd(*, teacher: str, args: TrainingArguments, beta: float = 0.5, **parts: Any) -> Trainer:
    """Build TRL's ``GKDTrainer`` (arXiv 2306.13649), which trains on the texts of the data set alone (``lmbda=0``).

    Its loss is the divergence to the teacher, without a loss of the labels. Evaluations measure the labels' loss, as those of a
    plain Trainer do.

    Args:
        teacher: the folder of the teacher.
        args: the arguments of the training, as for a plain Trainer.
        beta: 0 is the forward KL, 1 the reverse KL, and 0.5 the Jensen-Shannon divergence.
        **parts: ``model``, ``train_dataset`` and the other arguments of a Trainer.

    Raises:
        DistillError: TRL is not installed, or has no such Trainer.
    """
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise DistillError(f"TRL's GKDTrainer cannot be imported ({error}); pip install trl==1.16.0") from error

    class OnTexts(GKDTrainer):
        """The trainer with evaluations by the labels."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **told: Any) -> Any:
            if model.training:
                return super().compute_loss(model, inputs, return_outputs, **told)
            return Trainer.compute_loss(self, model, inputs, return_outputs, **told)

    told = args.to_dict() | {"hub_token": args.hub_token}
    config = GKDConfig(**told, lmbda=0.0, beta=beta, disable_dropout=False)
    large = AutoModelForCausalLM.from_pretrained(teacher)
    trainer: Trainer = OnTexts(teacher_model=large, args=config, **parts)
    return trainer
