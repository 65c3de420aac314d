"""To the Hugging Face hub, with the token that `hf auth login` has stored or HF_TOKEN holds."""

from pathlib import Path

from huggingface_hub import HfApi


def publish(folder: Path, name: str, private: bool) -> str:
    """Upload an exported folder as a model; returns its address.

    Raises:
        ValueError: the hub refuses, or cannot be reached; the folder stays as it is.
    """
    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=private, repo_type="model", exist_ok=True)
        hub.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a SORSA export")
    except Exception as error:  # of the hub's client, of the network, of the token
        raise ValueError(
            f"--push_to_hub {name}: {error}\nThe export itself is whole: {folder}. Log in (hf auth login), then export "
            f"again into another folder, or upload it: hf upload {name} {folder}"
        ) from error
    return str(repository)
