"""Where images come from: each kind of source gives a listing, by which any image is one ranged read."""
