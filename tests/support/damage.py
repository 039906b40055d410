"""Records of our own as they are found after damage, a careless edit, or an attempt to break in."""

DEEP = b"[" * 100_000
DAMAGED = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"12",
    b"{}",
    b'{"time": NaN, "since": NaN}',
    b'{"time": Infinity}',
    b'{"time": 1e999}',
    b'{"time": ' + b"9" * 5000 + b"}",
    b'{"a": ' * 100_000,
    DEEP,
    b"\xff\xfe\x00",
    b'{"time": {"a": 1}, "host": [], "pid": {}, "since": null, "members": {}, "about": 3, "files": [], "values": 1}',
)
