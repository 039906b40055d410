"""Sources of images: each kind gives a listing, by which any image is one ranged read."""
