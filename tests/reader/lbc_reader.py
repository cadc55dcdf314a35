#!/usr/bin/python3
"""A second reader of checkpoint files, written from checkpoint/FORMAT.md alone.

lbc_reader.py [--key FILE | --passphrase TEXT] [--dump DIR] CHECKPOINT.lbc [PARENT.lbc ...]

Checks every octet of every file given, the parents in their order, and puts the memory together. Prints what is in it
and a SHA-256 of each block; --dump writes each block to DIR/NAME, and the device state to DIR/device-state. Exit 1 on the
first thing that FORMAT.md does not allow. Needs libzstd, libxxhash and libsodium.
"""
import argparse
import ctypes
import ctypes.util
import hashlib
import json
import os
import struct
import sys

PAGE = 4096
MIB = 1 << 20
PAGES, INDEX, HASHES, HOT, STATE, META, TRAILER, PARTS = range(1, 9)
NAMES = {PAGES: "PAGES", INDEX: "INDEX", HASHES: "HASHES", HOT: "HOT", STATE: "STATE", META: "META",
         TRAILER: "TRAILER", PARTS: "PARTS"}
ORDER = [PAGES, PARTS, INDEX, HASHES, HOT, STATE, META, TRAILER]
ZERO, WHOLE, XOR = range(3)


class Bad(Exception):
    pass


def check(ok, why):
    if not ok:
        raise Bad(why)


def library(name):
    path = ctypes.util.find_library(name)
    if not path:
        sys.exit("lib%s is not installed" % name)
    return ctypes.CDLL(path)


zstd, xxhash, sodium = library("zstd"), library("xxhash"), library("sodium")


class Hash128(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


xxhash.XXH3_128bits_withSeed.restype = Hash128
xxhash.XXH3_128bits_withSeed.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
for function in (zstd.ZSTD_decompress, zstd.ZSTD_findFrameCompressedSize):
    function.restype = ctypes.c_size_t
zstd.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong


def xxh(data, seed=0):
    h = xxhash.XXH3_128bits_withSeed(data, len(data), seed)
    return struct.pack(">QQ", h.high, h.low)


def unzstd(data, size, what):
    n = ctypes.c_size_t(len(data))
    check(zstd.ZSTD_findFrameCompressedSize(data, n) == len(data), what + "not exactly one zstd frame")
    check(zstd.ZSTD_getFrameContentSize(data, n) == size, what + "the zstd frame's size")
    out = ctypes.create_string_buffer(max(size, 1))
    check(zstd.ZSTD_decompress(out, ctypes.c_size_t(size), data, n) == size, what + "cannot be unpacked")
    return out.raw[:size]


def open_box(cipher, tag, ad, nonce, key):
    """XChaCha20-Poly1305; None when the tag is wrong."""
    out = ctypes.create_string_buffer(max(len(cipher), 1))
    rc = sodium.crypto_aead_xchacha20poly1305_ietf_decrypt_detached(
        out, None, cipher, ctypes.c_ulonglong(len(cipher)), tag, ad, ctypes.c_ulonglong(len(ad)), nonce, key)
    return out.raw[:len(cipher)] if rc == 0 else None


def argon2id(passphrase, salt, ops, memory):
    out = ctypes.create_string_buffer(32)
    rc = sodium.crypto_pwhash(out, ctypes.c_ulonglong(32), passphrase, ctypes.c_ulonglong(len(passphrase)), salt,
                              ctypes.c_ulonglong(ops), ctypes.c_size_t(memory), 2)
    check(rc == 0, "Argon2id failed")
    return out.raw


def zeros(data):
    return not any(data)


def up(at, to):
    return (at + to - 1) // to * to


class File:
    def __init__(self, path, args):
        self.path = path
        with open(path, "rb") as f:
            self.data = f.read()
        try:
            self.header(args)
            self.walk()
            self.index()
            self.hashes_and_rest()
        except struct.error:
            raise Bad("%s: something is cut off" % path)

    def bad(self, ok, why):
        check(ok, "%s: %s" % (self.path, why))

    def header(self, args):
        d = self.data
        self.bad(len(d) > 4096 and len(d) % 4096 == 0 and d[:8] == b"LBCKPT1\n", "no whole checkpoint")
        (version, flags, self.id, self.parent, page, self.chunk, self.n_blocks, kind, z, salt, ops, memory, nonce) = \
            struct.unpack_from("<II16s16sQIIII16sQQ24s", d, 8)
        self.bad(version == 1 and flags & ~3 == 0, "version or flags")
        self.bad(xxh(d[:4080]) == d[4080:4096], "header: checksum")
        self.encrypted, self.increment = bool(flags & 1), bool(flags & 2)
        self.bad(self.increment != zeros(self.parent) and not zeros(self.id), "ids")
        self.bad(page == PAGE and 1 <= self.chunk <= 256 and 1 <= self.n_blocks <= 4096, "header: sizes")
        self.bad(z == 0 and zeros(d[176:4080]), "header: zeros")
        self.bad(kind <= 2 and (kind != 0) == self.encrypted, "kind of key")
        self.bad(ops <= 16 and memory <= 1 << 30, "limits of Argon2id")
        if not self.encrypted:
            self.bad(zeros(d[72:176]), "a key and no encryption")
            return
        if kind == 1:
            self.bad(args.key, "is encrypted with a key file")
            with open(args.key, "rb") as f:
                key = f.read()
            key = key if len(key) == 32 else bytes.fromhex(key.decode().strip())
        else:
            self.bad(args.passphrase, "is encrypted with a passphrase")
            key = argon2id(args.passphrase.encode(), salt, ops, memory)
        self.key = open_box(d[128:160], d[160:176], d[:72], nonce, key)
        self.bad(self.key, "wrong key")

    def part(self, at, number):
        """The part at `at`: kind, pages, table bytes, content, end."""
        d, what = self.data, "%s: part %d at %d: " % (self.path, number, at)
        check(at + 48 <= len(d), what + "beyond the end")
        magic, kind, n, flags, stored, unpacked, n_pages, table = struct.unpack_from("<4sIIIIIII", d, at)
        tag, end = d[at + 32:at + 48], at + 48 + stored
        check(magic == b"LBPT" and kind in NAMES and n == number and flags <= (kind != TRAILER), what + "head")
        check(stored <= 64 * MIB and unpacked <= 64 * MIB and end <= len(d), what + "sizes")
        body, head = d[at + 48:end], d[at:at + 32]
        if self.encrypted:
            body = open_box(body, tag, head + self.id, bytes(16) + struct.pack("<Q", number), self.key)
            check(body is not None, what + "tag")
        else:
            check(xxh(head + body, struct.unpack("<Q", self.id[:8])[0]) == tag, what + "check")
        body = unzstd(body, unpacked, what) if flags & 1 else body
        check(len(body) == unpacked, what + "unpacked size")
        if kind == PAGES:
            check(1 <= n_pages <= self.chunk and table == 16 * n_pages and unpacked == n_pages * (16 + PAGE),
                  what + "pages")
        else:
            check(n_pages == table == 0, what + "pages in no chunk")
        return kind, n_pages, stored, tag, body, end

    def walk(self):
        d = self.data
        trailer_at, magic = struct.unpack("<Q8s", d[-16:])
        self.bad(magic == b"LBCKEND\n", "no end")
        at, number, place, tags, table = 4096, 0, 0, b"", b""
        self.chunks, self.joined, first, n_pages_all = [], {}, {}, 0
        while True:
            kind, n_pages, stored, tag, body, end = self.part(at, number)
            self.bad(ORDER.index(kind) >= place, "part %d: %s is not in order" % (number, NAMES[kind]))
            place = ORDER.index(kind)
            if kind == TRAILER:
                break
            tags += tag
            first.setdefault(kind, at)
            if kind == PAGES:
                entries = [struct.unpack_from("<IIQ", body, 16 * i) for i in range(n_pages)]
                self.chunks.append((entries, body[16 * n_pages:]))
                table += struct.pack("<I", stored) + tag
                n_pages_all += n_pages
            else:
                self.joined[kind] = self.joined.get(kind, b"") + body
            at, number = up(end, 16), number + 1
            self.bad(zeros(d[end:at]), "part %d: something behind it" % (number - 1))
        self.bad(at == trailer_at and stored == len(body) == 112, "trailer's place")
        self.bad(len(d) == up(end + 16, 4096) and zeros(d[end:-16]), "the end of the file")
        t = struct.unpack("<12Q16s", body)
        for kind, said in zip((PARTS, INDEX, HASHES, HOT, STATE, META), t):
            self.bad(first.get(kind, 0) == said and (said or kind == HOT), "trailer: place of %s" % NAMES[kind])
        self.bad(t[6:9] == (number, at, n_pages_all) and t[10:12] == (len(self.chunks), 0), "trailer: numbers")
        self.bad(t[12] == xxh(tags), "the checksum of the whole")
        self.bad(self.joined[PARTS] == table, "PARTS is not what the parts are")
        self.n_runs = t[9]

    def index(self):
        ix, at, self.blocks, self.runs = self.joined[INDEX], 0, [], []
        for _ in range(self.n_blocks):
            n, kind, pages = struct.unpack_from("<IIQ", ix, at)
            name = ix[at + 16:at + 16 + n]
            self.bad(1 <= n <= 255 and len(name) == n and 0 not in name and kind <= 2 and pages <= 1 << 36, "a block")
            self.blocks.append((name.decode(), kind, pages))
            at += 16 + n
        n_runs, = struct.unpack_from("<Q", ix, at)
        self.bad(n_runs == self.n_runs and len(ix) == at + 8 + 24 * n_runs, "number of runs")
        before, differences = (0, 0), set()
        for block, kind, first, packed in struct.iter_unpack("<IIQQ", ix[at + 8:]):
            self.bad(block < self.n_blocks and kind <= 2, "run: block or kind")
            count, part, slot = (packed, 0, 0) if kind == ZERO else (packed >> 48, packed >> 16 & 0xffffffff,
                                                                      packed & 0xffff)
            self.bad(count > 0 and first + count <= self.blocks[block][2], "run: beyond its block")
            self.bad((block, first) >= before, "run: order")
            before = (block, first + count)
            if kind != ZERO:
                self.bad(part < len(self.chunks) and slot + count <= len(self.chunks[part][0]), "run: no such page")
            for i in range(count if kind != ZERO else 0):
                entry = self.chunks[part][0][slot + i]
                self.bad(entry[1] == (1 if kind == XOR else 0), "run: kind of the page")
                self.bad(kind != XOR or (entry == (block, 1, first + i) and (part, slot + i) not in differences),
                         "run: a difference of another page")
                if kind == XOR:
                    differences.add((part, slot + i))
            self.runs.append((block, kind, first, count, part, slot))
        for entries, _ in self.chunks:
            for block, kind, page in entries:
                self.bad(block == entries[0][0] and block < self.n_blocks and page < self.blocks[block][2] and
                         kind <= (1 if self.increment else 0), "page table")

    def hashes_and_rest(self):
        raw = self.joined[HASHES]
        stored = sum(r[3] for r in self.runs if r[1] != ZERO)
        self.bad(len(raw) == 8 + 16 * stored, "number of hashes")
        self.seed, = struct.unpack_from("<Q", raw)
        self.hashes = [raw[8 + 16 * i:24 + 16 * i] for i in range(stored)]
        hot = self.joined.get(HOT, b"")
        self.bad(len(hot) % 8 == 0, "hot pages")
        self.hot = [(v >> 40, v & ((1 << 40) - 1)) for v, in struct.iter_unpack("<Q", hot)]
        self.bad(all(b < self.n_blocks and p < self.blocks[b][2] for b, p in self.hot), "a hot page")
        self.bad(max(len(self.joined[META]), len(self.joined[STATE])) <= 256 * MIB, "META or STATE is too long")
        self.meta = json.loads(self.joined[META].decode())
        for name, kind in (("vm", str), ("label", str), ("number", int), ("suspend", bool), ("no_disk", bool),
                           ("paused", bool), ("created_ms", int), ("pause_ms", (int, float)), ("stats", dict),
                           ("disks", list), ("description", str)):
            self.bad(isinstance(self.meta.get(name), kind), "meta: " + name)

    def page(self, part, slot):
        return self.chunks[part][1][slot * PAGE:(slot + 1) * PAGE]


def lay(memory, file):
    """memory: (block, page) -> (content, stored whole) of all files below."""
    at = 0
    for block, kind, first, count, part, slot in file.runs:
        for i in range(count):
            where = (block, first + i)
            if kind == ZERO:
                memory.pop(where, None)
                continue
            data = file.page(part, slot + i)
            if kind == XOR:
                below, whole = memory.get(where, (None, False))
                file.bad(whole, "page %d of block %d differs from one that is not stored whole" % (first + i, block))
                data = (int.from_bytes(data, "big") ^ int.from_bytes(below, "big")).to_bytes(PAGE, "big")
            file.bad(xxh(data, file.seed) == file.hashes[at], "page %d of block %d: hash" % (first + i, block))
            memory[where] = (data, kind == WHOLE)
            at += 1


def digest(name, n_pages, pages, out):
    h, empty = hashlib.sha256(), bytes(PAGE)
    with open(os.path.join(out, name.replace("/", "_")), "wb") if out else open(os.devnull, "wb") as f:
        for p in range(n_pages):
            page = pages.get(p, empty)
            h.update(page)
            f.write(page)
    return h.hexdigest()


def read(args):
    check(len(args.files) <= 1024, "more than 1024 files")
    files = [File(path, args) for path in args.files]
    for child, parent in zip(files, files[1:]):
        check(child.parent == parent.id, "%s is not the parent of %s" % (parent.path, child.path))
        check(child.blocks == parent.blocks, "the blocks of %s and its parent" % child.path)
        check(child.seed == parent.seed, "the seeds of %s and its parent" % child.path)
    check(not files[-1].increment, "the parent of %s is missing" % files[-1].path)
    memory = {}
    for file in reversed(files):
        lay(memory, file)
    top = files[0]
    kinds = [sum(r[3] for r in top.runs if r[1] == k) for k in (ZERO, WHOLE, XOR)]
    print("%s@%s: %d files, %d zero, %d whole, %d differences, %d chunks, %d hot, state %d" %
          (top.meta["vm"], top.meta["number"] or "suspend", len(files), *kinds, len(top.chunks), len(top.hot),
           len(top.joined[STATE])))
    for b, (name, _, n_pages) in enumerate(top.blocks):
        pages = {p: data for (block, p), (data, _) in memory.items() if block == b}
        print("%s %d pages, %d stored, sha256 %s" % (name, n_pages, len(pages),
                                                     digest(name, n_pages, pages, args.dump)))
    if args.dump:
        with open(os.path.join(args.dump, "device-state"), "wb") as f:
            f.write(top.joined[STATE])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--key")
    p.add_argument("--passphrase")
    p.add_argument("--dump")
    p.add_argument("files", nargs="+")
    check(sodium.sodium_init() >= 0, "libsodium")
    try:
        read(p.parse_args())
    except (Bad, ValueError, UnicodeDecodeError) as why:
        print("not valid: %s" % why, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
