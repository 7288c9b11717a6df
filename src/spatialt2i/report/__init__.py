"""The report room: what a run folder holds, as figures, one self-contained page, and a card of text. It only reads."""
