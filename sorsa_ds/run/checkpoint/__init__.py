"""Checkpoints: what training changed, and nothing else; readable at any number of ranks and any ZeRO stage.

    RUN/checkpoints/latest                  the name of the newest one
    RUN/checkpoints/step-000100/
        checkpoint.json                     step, schedule, settings, digests of every file and of the base weights
        rank-00000.safetensors, ...         each rank's fragments of U, s, V and of AdamW's two moments, in fp32

A checkpoint takes 12 bytes per trained number. The frozen residual is not in it: it follows from the base model and
the run's initial factors (RUN/adapter/initial_factors.safetensors), whose digests are checked. `as_run` opens one as if
the run had ended there.
"""
