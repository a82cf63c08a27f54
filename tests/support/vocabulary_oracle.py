"""A vocabulary by dictionaries and Python's integers, one id after another."""

import collections

MASK = 2**32 - 1


def mix(x):
    x = ((x ^ x >> 16) * 0x7FEB352D) & MASK
    x = ((x ^ x >> 15) * 0x846CA68B) & MASK
    return x ^ x >> 16


def hashes(key):
    high, low = key >> 32, key & MASK
    a = mix(low ^ mix((high + 0x9E3779B9) & MASK))
    b = mix((a + high * 0x85EBCA6B + 0xC2B2AE35) & MASK)
    return a, b, mix(a ^ (b << 16) & MASK ^ b >> 16)


class Vocabulary:
    """Ids get rows in order of preference, each the best that is left."""

    def __init__(
        self,
        num_embeddings,
        *,
        num_buckets=1,
        num_probes=32,
        admission_count=1,
        eviction="lru",
        time_to_live=None,
        num_unknown_rows=1,
    ):
        self.num_buckets = num_buckets
        self.bucket_size = num_embeddings // num_buckets
        self.num_unknown_rows = num_unknown_rows
        self.reserved = max(1, num_unknown_rows // num_buckets)
        self.num_slots = self.bucket_size - self.reserved
        self.num_probes = min(num_probes, self.num_slots)
        self.admission_count = admission_count
        self.eviction = eviction
        self.time_to_live = time_to_live or 0
        self.ids = {}  # by row
        self.rows = {}  # by id
        self.last_seen = {}  # by row
        self.counts = {}
        self.new_rows = []
        self.cells = 16
        while self.cells < 4 * self.bucket_size:
            self.cells *= 2
        self.sketch = {}  # by bucket and cell: the epoch and the count
        self.updates = collections.Counter()
        self.totals = collections.Counter()

    def probes(self, key):
        a, b, _ = hashes(key)
        first = a % self.num_buckets * self.bucket_size + self.reserved
        start = b % self.num_slots
        slots = ((start + p) % self.num_slots for p in range(self.num_probes))
        return [first + slot for slot in slots]

    def unknown_row(self, key):
        if self.num_unknown_rows == 1:
            return 0
        a, _, spare = hashes(key)
        return a % self.num_buckets * self.bucket_size + spare % self.reserved

    def lookup(self, ids):
        return [self.rows.get(key, self.unknown_row(key)) for key in ids]

    def assign(self, ids, step):
        occurrences = collections.Counter(ids)
        hits = {key for key in occurrences if key in self.rows}
        for key in hits:
            row = self.rows[key]
            self.last_seen[row] = step
            self.counts[row] += occurrences[key]
        missed = {key: n for key, n in occurrences.items() if key not in hits}
        counted = self._count(missed) if self.admission_count > 1 else missed
        admitted = [k for k in missed if counted[k] >= self.admission_count]
        self.totals["hits"] += sum(occurrences[key] for key in hits)
        self._place(admitted, counted, step)
        self.totals["misses"] += sum(n for k, n in missed.items() if k not in self.rows)
        self.totals["rejections"] += sum(key not in self.rows for key in admitted)
        self.totals["size"] = len(self.rows)
        return self.lookup(ids)

    def _place(self, admitted, counted, step):
        evictable = {
            row: self.counts[row] if self.eviction == "lfu" else self.last_seen[row]
            for row in self.ids
            if self.eviction and self.last_seen[row] < step - self.time_to_live
        }
        occupied = set(self.ids)
        self.new_rows = []
        for key in sorted(admitted, key=lambda key: (-counted[key], key)):
            choices = [
                (-1 if row not in occupied else evictable[row], probe, row)
                for probe, row in enumerate(self.probes(key))
                if row not in self.new_rows
                and (row not in occupied or row in evictable)
            ]
            if not choices:
                continue
            row = min(choices)[2]
            if row in occupied:
                self.totals["evictions"] += 1
                del self.rows[self.ids[row]]
            self.totals["admissions"] += 1
            self.new_rows.append(row)
            self.ids[row], self.rows[key] = key, row
            self.last_seen[row], self.counts[row] = step, counted[key]

    def _count(self, missed):
        def cells(key):
            a, _, spare = hashes(key)
            line = spare % (self.cells // 16)
            for quarter in range(4):
                choice = spare >> (24 + 2 * quarter) & 3
                yield a % self.num_buckets, line * 16 + 4 * quarter + choice

        before = dict(self.updates)
        for key in missed:
            for bucket, cell in cells(key):
                epoch = before.get(bucket, 0) // (self.cells // 4)
                old_epoch, count = self.sketch.get((bucket, cell), (0, 0))
                self.sketch[bucket, cell] = (epoch, count >> (epoch - old_epoch))
        for key, n in missed.items():
            for at in cells(key):
                self.sketch[at] = (self.sketch[at][0], self.sketch[at][1] + n)
            self.updates[hashes(key)[0] % self.num_buckets] += n
        return {key: min(self.sketch[at][1] for at in cells(key)) for key in missed}
