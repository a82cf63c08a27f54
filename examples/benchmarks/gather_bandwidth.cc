// Measures how fast this machine gathers random rows of a table in memory.
//
//   c++ -std=c++17 -O3 -march=native -pthread gather_bandwidth.cc -o gather
//   ./gather THREADS ROWS ROW_BYTES [--huge-pages]
//
// Prints GB/s: 1e9 bytes of rows a second. An embedding bag does nothing but
// this and some arithmetic that hides behind it, so this is its speed limit on
// a table that is larger than the caches. The table lies on 4 KiB pages, as
// memory does where nobody asks for better, or on huge ones.

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t kLineWords = 64 / sizeof(uint32_t);  // of a cache line
constexpr size_t kBytesRead = size_t{1} << 28;        // in each measurement
constexpr size_t kLongestDistance = 128;              // in rows
constexpr int kRepeats = 3;

// Runs `work(thread)` on every thread; returns the seconds until all are done.
double RunOnAll(size_t threads, const std::function<void(size_t)>& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> pool;
  for (size_t thread = 0; thread < threads; ++thread) {
    pool.emplace_back(work, thread);
  }
  for (std::thread& running : pool) running.join();
  const auto end = std::chrono::steady_clock::now();
  return std::chrono::duration<double>(end - start).count();
}

// Sums a word of each cache line of the rows that `ids` name, but for the last
// ids, whose rows are only asked for. A row is requested `distance` rows before
// it is read, so that many are on their way from memory at a time.
uint32_t GatherRows(const uint32_t* table, size_t row_words,
                    const std::vector<uint32_t>& ids, size_t distance) {
  // A row that isn't whole lines may reach into one more.
  const bool ragged = row_words % kLineWords != 0;
  uint32_t sum = 0;
  for (size_t i = 0; i + kLongestDistance < ids.size(); ++i) {
    const uint32_t* ahead = table + ids[i + distance] * row_words;
    for (size_t word = 0; word < row_words; word += kLineWords) {
      __builtin_prefetch(ahead + word);
    }
    if (ragged) __builtin_prefetch(ahead + row_words - 1);
    const uint32_t* row = table + ids[i] * row_words;
    for (size_t word = 0; word < row_words; word += kLineWords) {
      sum += row[word];
    }
    if (ragged) sum += row[row_words - 1];
  }
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  const bool huge = argc == 5 && std::string(argv[4]) == "--huge-pages";
  const size_t threads = argc > 3 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const size_t rows = argc > 3 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const size_t row_bytes = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
  if (argc != 4 + huge || rows == 0 || rows > UINT32_MAX || row_bytes == 0 ||
      row_bytes % sizeof(uint32_t) != 0 || threads == 0) {
    std::fprintf(stderr,
                 "usage: %s THREADS ROWS ROW_BYTES [--huge-pages]\n"
                 "ROW_BYTES must be a multiple of 4\n",
                 argv[0]);
    return 2;
  }
  void* memory = mmap(nullptr, rows * row_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    return 1;
  }
#ifdef MADV_HUGEPAGE  // Linux. A kernel that knows no huge pages uses none.
  const int advice = huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
  const bool advised = madvise(memory, rows * row_bytes, advice) == 0;
#else
  const bool advised = false;
#endif
  if (huge && !advised) {
    std::fprintf(stderr, "this system has no huge pages to ask for\n");
    return 1;
  }
  uint32_t* table = static_cast<uint32_t*>(memory);
  const size_t row_words = row_bytes / sizeof(uint32_t);
  const size_t reads = std::max<size_t>(1, kBytesRead / row_bytes / threads);

  // Memory is of the processor that first writes to it: share it out.
  std::vector<std::vector<uint32_t>> ids(threads);
  RunOnAll(threads, [&](size_t thread) {
    const size_t words = rows * row_words;
    std::fill(table + words * thread / threads, table + words * (thread + 1) / threads,
              1);
    std::mt19937 generator(static_cast<uint32_t>(thread));
    ids[thread].resize(reads + kLongestDistance);
    for (uint32_t& id : ids[thread]) {
      id = static_cast<uint32_t>(uint64_t{generator()} * rows >> 32);
    }
  });

  // The best distance differs from machine to machine, and with the rows.
  double fastest = std::numeric_limits<double>::infinity();
  uint32_t total = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    for (size_t distance = 1; distance <= kLongestDistance; distance *= 2) {
      std::vector<uint32_t> sums(threads);
      const double seconds = RunOnAll(threads, [&](size_t thread) {
        sums[thread] = GatherRows(table, row_words, ids[thread], distance);
      });
      fastest = std::min(fastest, seconds);
      total = std::accumulate(sums.begin(), sums.end(), total);
    }
  }
  // A sum that nobody looks at is one that the compiler leaves out.
  if (total == 0) std::fprintf(stderr, "the words read sum to zero\n");
  const double bytes = static_cast<double>(reads * threads * row_bytes);
  std::printf("%.3f\n", bytes / fastest / 1e9);
  return 0;
}
