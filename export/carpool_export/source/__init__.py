"""What goes in: a model's folder, found and checked by its JSON files before any work."""

from carpool_export.source.find import find_model
from carpool_export.source.folder import ModelSource, is_chain, open_source

__all__ = ["ModelSource", "find_model", "is_chain", "open_source"]
