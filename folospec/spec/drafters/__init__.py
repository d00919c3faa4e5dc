"""The drafters that come with folospec, one file each. Importing this package registers them."""

from folospec.spec.drafters.base import register_drafter
from folospec.spec.drafters.draft_model import DraftModelDrafter
from folospec.spec.drafters.ngram import NgramDrafter

register_drafter("ngram", NgramDrafter)
register_drafter("draft_model", DraftModelDrafter)
