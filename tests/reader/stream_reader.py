#!/usr/bin/python3
"""Independent reader of a bulk connection, written from netproto/STREAM.md alone.

stream_reader.py --secret HEX --session HEX [--checkpoint | --zero-copy] I2R.bin R2I.bin

I2R.bin holds what the initiator sent (from hello on, without the preamble), R2I.bin what the responder sent. Checks
the key agreement and, in plaintext mode (cipher 0), every octet of every record. Prints a summary; exit 1 on the first
thing that STREAM.md does not allow. Compressed payloads: the zstd frame header is checked, the content is not. With
--checkpoint the connection is one of section 6; END may be missing there when an epoch is complete.
"""
import argparse
import hashlib
import hmac
import struct
import sys

M64 = (1 << 64) - 1
P1, P2, P3, P4, P5 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                      0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
PAGE = 4096
MAX_BLOB = 67108864
NAMES = {1: "PAGES", 2: "ZERO", 3: "ROUND_END", 4: "STATE", 5: "END", 6: "DELTA", 7: "DISK", 8: "FRAMES", 9: "EPOCH_END",
         10: "WRITTEN", 11: "ASK", 12: "GRANT"}
ROUNDS, CHECKPOINTS = (1, 2, 3, 4, 5), (1, 2, 4, 5, 6, 7, 8, 9)


class Bad(Exception):
    pass


def check(ok, why):
    if not ok:
        raise Bad(why)


def rotl(x, r):
    return ((x << r) | (x >> (64 - r))) & M64


def xxh_round(acc, lane):
    return rotl((acc + lane * P2) & M64, 31) * P1 & M64


def xxh64(data, seed):
    n, at = len(data), 0
    if n >= 32:
        v = [(seed + P1 + P2) & M64, (seed + P2) & M64, seed, (seed - P1) & M64]
        whole = n // 32 * 32
        a, b, c, d = v
        for l0, l1, l2, l3 in struct.iter_unpack("<4Q", data[:whole]):
            a, b, c, d = xxh_round(a, l0), xxh_round(b, l1), xxh_round(c, l2), xxh_round(d, l3)
        h = (rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18)) & M64
        for x in (a, b, c, d):
            h = ((h ^ xxh_round(0, x)) * P1 + P4) & M64
        at = whole
    else:
        h = (seed + P5) & M64
    h = (h + n) & M64
    while at + 8 <= n:
        h = (rotl(h ^ xxh_round(0, struct.unpack_from("<Q", data, at)[0]), 27) * P1 + P4) & M64
        at += 8
    if at + 4 <= n:
        h = (rotl(h ^ (struct.unpack_from("<I", data, at)[0] * P1 & M64), 23) * P2 + P3) & M64
        at += 4
    for octet in data[at:]:
        h = rotl(h ^ (octet * P5 & M64), 11) * P1 & M64
    h = (h ^ (h >> 33)) * P2 & M64
    h = (h ^ (h >> 29)) * P3 & M64
    return h ^ (h >> 32)


def mac(key, msg):
    return hmac.new(key, msg, hashlib.sha256).digest()


def hkdf(salt, ikm, info, n):
    prk, out, block, i = mac(salt, ikm), b"", b"", 1
    while len(out) < n:
        block = mac(prk, block + info + bytes([i]))
        out += block
        i += 1
    return out[:n]


class Stream:
    def __init__(self, data, what):
        self.data, self.at, self.what = data, 0, what

    def take(self, n):
        check(self.at + n <= len(self.data),
              "%s ends at octet %d, %d more are needed" % (self.what, len(self.data), n))
        self.at += n
        return self.data[self.at - n:self.at]


def key_agreement(i2r, r2i, secret, session):
    hello, answer, confirm = i2r.take(80), r2i.take(64), i2r.take(32)
    check(hello[0:4] == b"LBB1", "hello: magic")
    index, cipher = struct.unpack_from("<IB", hello, 4)
    check(index < 256, "hello: index %d" % index)
    check(hello[9:16] == bytes(7), "hello: octets 9..15 are not zero")
    check(cipher == 0, "cipher %d: only plaintext mode can be read" % cipher)
    check(mac(hkdf(session, secret, b"lb bulk hello v1", 32), hello[:48]) == hello[48:], "hello: MAC")
    keys = hkdf(hello[16:48] + answer[:32], secret, b"lb bulk keys  v1" + session + hello[:16], 128)
    check(mac(keys[96:128], answer[:32]) == answer[32:], "answer: confirmation")
    check(mac(keys[64:96], answer[:32]) == confirm, "confirm")
    return index


class Pieces:
    def __init__(self, stream):
        self.stream, self.number = stream, 0

    def take(self, n):
        data, tag = self.stream.take(n), self.stream.take(16)
        check(struct.unpack("<QQ", tag) == (xxh64(data, self.number), self.number),
              "piece %d, before octet %d: tag" % (self.number, self.stream.at))
        self.number += 1
        return data


def zstd_content_size(frame):
    check(len(frame) >= 6 and frame[:4] == b"\x28\xb5\x2f\xfd", "not a zstd frame")
    fcs, single, did = frame[4] >> 6, frame[4] >> 5 & 1, frame[4] & 3
    check(frame[4] & 0x08 == 0, "zstd: reserved bit")
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[did]
    size = (1 if single else 0, 2, 4, 8)[fcs]
    check(size > 0 and len(frame) >= at + size, "zstd: no content size")
    value = int.from_bytes(frame[at:at + size], "little")
    return value + 256 if size == 2 else value


class Epochs:
    """What one epoch may be, over its records."""

    def __init__(self):
        self.next, self.state_before = 1, 0
        self.reset()

    def reset(self):
        self.begun, self.pages, self.state, self.frames = False, {}, 0, 0

    def take(self, what, rtype, rnd, block, codec, runs, payload):
        if rtype == 5:
            check(not self.begun, what + "in the middle of an epoch")
            return
        if rtype == 7 and rnd == 0 and self.next == 1 and not self.begun:
            return  # the first copy
        check(rnd == self.next & 0xffffffff, what + "round %d in epoch %d" % (rnd, self.next))
        self.begun = True
        for first, count in runs:
            seen = self.pages.setdefault(block, set())
            check(seen.isdisjoint(range(first, first + count)), what + "a page twice")
            seen.update(range(first, first + count))
        size = 0 if rtype not in (4, 8) else zstd_content_size(payload) if codec else len(payload)
        if rtype == 4:
            self.state += size
            check(codec != 2 or self.state <= self.state_before, what + "more than the state before")
            check(self.state <= MAX_BLOB, what + "too much")
        if rtype == 8:
            self.frames += size
            check(self.frames <= MAX_BLOB, what + "too much")
        if rtype == 9:
            check(struct.unpack("<Q", payload)[0] == self.next, what + "number")
            check(self.state > 0, what + "no device state")
            self.next, self.state_before = self.next + 1, self.state
            self.reset()


def operations(what, data):
    at = 0
    while at < len(data):
        check(at + 24 <= len(data), what + "operation cut off")
        kind, zero, offset, length = struct.unpack_from("<IIQQ", data, at)
        check(kind in (1, 2) and zero == 0 and length > 0 and offset + length < 1 << 63, what + "operation")
        at += 24 + (length if kind == 1 else 0)
    check(at == len(data), what + "operation longer than its record")


def checkpoint_record(what, rtype, block, codec, n_runs, n_pages, payload):
    if rtype == 6:
        check(n_runs >= 1 and 1 <= n_pages <= 256 and codec == 1, what + "pages or codec")
        check(8 < len(payload) < n_pages * PAGE + 8, what + "payload size")
        check(zstd_content_size(payload[8:]) == n_pages * PAGE, what + "zstd content size")
    if rtype in (4, 7, 8, 9):
        check(n_runs == n_pages == 0 and (rtype == 7 or block == 0), what + "fields set")
        check(codec <= {4: 2, 7: 1, 8: 1, 9: 0}[rtype] and len(payload) > 0, what + "codec or payload")
        check(codec == 0 or 1 <= zstd_content_size(payload) <= 1 << 20, what + "zstd content size")
        check(rtype != 9 or len(payload) == 8, what + "payload size")
    if rtype == 7 and codec == 0:
        operations(what, payload)


class ZeroCopy:
    """Section 8: the questions, and the answers that come back."""

    def __init__(self, r2i):
        self.answers, self.asked = Pieces(r2i), []

    def take(self, what, rtype, block, table, n_pages, payload):
        if rtype == 10:
            check(1 <= n_pages <= 256 and len(payload) == 8 * n_pages, what + "pages or payload size")
            return
        check(len(table) == 8 and 1 <= n_pages <= 4096, what + "runs or pages")
        check(struct.unpack("<I", table[:4])[0] % 4096 == 0, what + "first page")
        check(len(payload) == (4 if rtype == 11 else 16), what + "payload size")
        if rtype == 11:
            check(struct.unpack("<I", payload)[0] < 16, what + "slot")
            self.asked.append((block, table))
        else:
            check(self.asked and self.asked.pop(0) == (block, table), what + "not what was asked")
            check(struct.unpack("<I", payload[12:])[0] in (0, 1), what + "granted")


def record(pieces, index, totals, epochs, direct, allowed):
    h = pieces.take(32)
    (rtype, flags, codec, z1, block, rnd, n_runs, n_pages, n_bytes, z2) = struct.unpack("<HHB3sIIIIII", h)
    what = "%s record at octet %d: " % (NAMES.get(rtype, rtype), pieces.stream.at - 48)
    check(z1 == bytes(3) and z2 == 0, what + "reserved octets")
    check(flags & ~1 == 0, what + "flags")
    check(n_runs <= 4096 and n_bytes <= 1 << 20, what + "limits")
    known = rtype in NAMES
    check(known or flags & 1, what + "unknown type")
    check(not known or flags == 0, what + "marked optional")
    check(not known or rtype in allowed, what + "on a connection of the other kind")
    if known and rtype in (1, 2):
        check(n_runs >= 1, what + "no runs")
    elif known and rtype < 10 and (rtype == 5 or not epochs):
        check(n_runs == n_pages == block == codec == 0, what + "fields set")
        check((n_bytes > 0) == (rtype == 4), what + "payload")
        check(rtype != 4 or index == 0, what + "not on connection 0")
    if rtype == 1:
        check(1 <= n_pages <= 256 and codec in (0, 1), what + "pages or codec")
        check(n_bytes == n_pages * PAGE if codec == 0 else 0 < n_bytes < n_pages * PAGE, what + "payload size")
    if rtype == 2:
        check(n_bytes == 0 and codec == 0, what + "payload")
    table = pieces.take(8 * n_runs) if n_runs else b""
    if known:
        end = total = 0
        for first, count in struct.iter_unpack("<II", table):
            check(count > 0 and first >= end, what + "runs")
            end, total = first + count, total + count
        check(total == n_pages and end <= 1 << 32, what + "sum of runs")
    payload = pieces.take(n_bytes) if n_bytes else b""
    if epochs and known:
        checkpoint_record(what, rtype, block, codec, n_runs, n_pages, payload)
        epochs.take(what, rtype, rnd, block, codec, struct.iter_unpack("<II", table), payload)
    if known and rtype >= 10:
        check(codec == 0 and n_runs >= 1, what + "codec or runs")
        direct.take(what, rtype, block, table, n_pages, payload)
    if rtype == 1 and codec == 1:
        check(zstd_content_size(payload) == n_pages * PAGE, what + "zstd content size")
    t = totals.setdefault(NAMES.get(rtype, "optional"), [0, 0, 0])
    t[0] += 1
    t[1] += n_pages
    t[2] += n_bytes
    if rtype == 1:
        totals["zstd" if codec else "raw"] = totals.get("zstd" if codec else "raw", 0) + n_pages
    return rtype


def read(args):
    i2r = Stream(open(args.i2r, "rb").read(), args.i2r)
    r2i = Stream(open(args.r2i, "rb").read(), args.r2i)
    index = key_agreement(i2r, r2i, bytes.fromhex(args.secret), bytes.fromhex(args.session))
    check(args.zero_copy or r2i.at == len(r2i.data), "the responder sent more than its answer")
    pieces, totals, epochs = Pieces(i2r), {}, Epochs() if args.checkpoint else None
    direct = ZeroCopy(r2i) if args.zero_copy else None
    allowed = CHECKPOINTS if epochs else ROUNDS + (10, 11) if direct else ROUNDS
    while record(pieces, index, totals, epochs, direct, allowed) != 5:
        if epochs and i2r.at == len(i2r.data) and not epochs.begun:
            break
    while direct and r2i.at < len(r2i.data):
        record(direct.answers, index, totals, None, direct, (12,))
    check(not direct or not direct.asked, "a question without an answer")
    if epochs:
        print("%d epochs" % (epochs.next - 1))
    check(i2r.at == len(i2r.data), "%d octets after END" % (len(i2r.data) - i2r.at))
    for name in list(NAMES.values()) + ["optional"]:
        if name in totals:
            print("%s: %d records, %d pages, %d payload octets" % (name, *totals[name]))
    print("index %d, %d octets, %d pieces, raw pages %d, zstd pages %d" %
          (index, len(i2r.data), pieces.number, totals.get("raw", 0), totals.get("zstd", 0)))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--secret", required=True)
    p.add_argument("--session", required=True)
    p.add_argument("--checkpoint", action="store_true")
    p.add_argument("--zero-copy", action="store_true")
    p.add_argument("i2r")
    p.add_argument("r2i")
    try:
        read(p.parse_args())
    except Bad as why:
        print("not valid: %s" % why, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
