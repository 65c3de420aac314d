"""NEFTune: noise on the embeddings in training, as transformers adds it (`train.neftune_noise_alpha`)."""

from transformers import PreTrainedModel

from sorsa_ds.runtime.console import say


def add_embedding_noise(model: PreTrainedModel, alpha: float | None) -> None:
    """Let transformers' hook add the noise whenever the model is in training mode. None: no noise.

    Raises:
        ValueError: the model does not tell its embeddings.
    """
    if alpha is None:
        return
    from transformers.integrations.neftune import activate_neftune

    try:
        activate_neftune(model, alpha)
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"train.neftune_noise_alpha={alpha:g}: {type(model).__name__} does not tell its input embeddings; leave "
            f"it out"
        ) from error
    say(f"NEFTune: noise of alpha {alpha:g} on the embeddings in training (train.neftune_noise_alpha).")
