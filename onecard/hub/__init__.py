"""A name becomes a verified folder: listing, transfer, revisions, consent to remote code."""
