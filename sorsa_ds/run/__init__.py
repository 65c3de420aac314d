"""What a run leaves on disk, and reading it back: its folder, its state, checkpoints, snapshots, the trained model."""
