"""The directory a device installs: manifest, program, theta, tokenizer, documents, golden step."""

from carpool.bundle.manifest import Manifest
from carpool.bundle.reader import Bundle
from carpool.bundle.writer import finish_bundle, require_nothing_at, staging_folder

__all__ = ["Bundle", "Manifest", "finish_bundle", "require_nothing_at", "staging_folder"]
