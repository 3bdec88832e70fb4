// Guess a low threshold, stream acc once and move what is above it to a list, refine the threshold on the
// list, emit the k winners in order and put the losers back. Where the guess was wrong the list goes back
// to err, which then holds all of acc, and a second guess or the full selection works on that.
#include "cpu/topk.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <optional>

#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"
#include "cpu/scratch.hpp"
#include "cpu/select.hpp"
#include "cpu/threads.hpp"
#include "cpu/topk_guess.hpp"

namespace gck {
namespace {

constexpr int64_t kMinSampled = 1 << 16;  // below, the whole vector is as near as a sample
constexpr int64_t kLanes = 16;            // that topk_maxima keeps apart
constexpr int64_t kTile = 4096;           // entries looked at together where err itself is emitted from
constexpr int64_t kAlone = 1 << 19;       // entries of a tensor that all threads work on together
constexpr int64_t kFinelyCut = 1 << 20;   // entries of a vector with kShares parts a thread
constexpr int kShares = 4;
constexpr int64_t kMany = INT64_MAX;            // for share_parts: worth all threads
constexpr int64_t kFreshResult = 1 << 14;       // winners of a part whose pages are worth asking for at once
constexpr int64_t kPlaceCost = 8;               // of an entry that is emitted, against one that is looked at
constexpr int64_t kMaxPart = int64_t{1} << 31;  // list positions are 32 bits
// A list is full when another block might not fit: it needs room for one more than what it is to hold, and
// behind that for the rest of a vector.
constexpr int64_t kSpare = 32, kBehind = 32;

// Lists nothing: with ties counted every NaN is the one that gck lets out, whose key is below.
constexpr Guess kNothing{kNanKey + 1, true, false};

// A stretch of one run, inside one part.
struct Piece {
  const void* grad;
  Dtype dtype;
  float* err;
  int64_t begin, count;  // begin: index in the concatenation
  Candidates list;
};

// What a thread works on in one go.
struct Part {
  std::vector<Piece> pieces;
  int64_t count = 0, listed = 0, ties = 0;
  bool overflow = false;
  int64_t cleared = 0;
};

std::vector<Part> parts_of(const TopkJob& job) {
  const int threads = parts_for(job.numel, job.threads);
  const int shares = threads > 1 && job.numel >= kFinelyCut ? kShares * threads : threads;
  const int count = std::max(shares, static_cast<int>((job.numel + kMaxPart - 1) / kMaxPart));
  std::vector<Part> parts(static_cast<size_t>(count));
  auto run = job.runs.begin();
  int64_t begin = 0;  // of the run
  for (int t = 0; t < count; ++t) {
    Part& part = parts[static_cast<size_t>(t)];
    const auto [first, last] = part_of(job.numel, count, t, 64);
    part.count = last - first;
    for (int64_t at = first; at < last;) {
      for (; at >= begin + run->numel; ++run) begin += run->numel;
      const int64_t end = std::min(last, begin + run->numel), inside = at - begin;
      const int64_t size = run->grad_dtype == Dtype::fp32 ? 4 : 2;
      part.pieces.push_back({static_cast<const char*>(run->grad) + inside * size,
                             run->grad_dtype,
                             run->err + inside,
                             at,
                             end - at,
                             {}});
      at = end;
    }
  }
  return parts;
}

// Memory of the lists: one a part, shared by its pieces, and keys for refining.
class Lists {
 public:
  // `more`: floats of memory for whoever needs some.
  Lists(const std::vector<Part>& parts, int64_t capacity, int64_t more = 0)
      : scratch_(bytes(parts, capacity) + Scratch::padded(static_cast<size_t>(more) * sizeof(float))) {
    size_t total = 0;
    for (const Part& part : parts) {
      const int64_t room = std::min(part.count, capacity) + kSpare;
      const auto slots = static_cast<size_t>(room + kBehind);
      rooms_.push_back({static_cast<float*>(scratch_.region(slots * sizeof(float))),
                        static_cast<uint32_t*>(scratch_.region(slots * sizeof(uint32_t))), room, 0, 0,
                        false});
      total += slots;
    }
    keys_ = static_cast<int32_t*>(scratch_.region(total * sizeof(int32_t)));
    more_ = static_cast<float*>(scratch_.region(static_cast<size_t>(more) * sizeof(float)));
  }

  const Candidates& room(size_t part) const { return rooms_[part]; }
  int32_t* keys() const { return keys_; }
  float* more() const { return more_; }

 private:
  static size_t bytes(const std::vector<Part>& parts, int64_t capacity) {
    size_t sum = 0, slots = 0;
    for (const Part& part : parts) {
      const auto room = static_cast<size_t>(std::min(part.count, capacity) + kSpare + kBehind);
      sum += 2 * Scratch::padded(room * sizeof(float));
      slots += room;
    }
    return sum + Scratch::padded(slots * sizeof(int32_t));
  }

  Scratch scratch_;
  std::vector<Candidates> rooms_;
  int32_t* keys_;
  float* more_;
};

// What is listed has left err but for what a winner leaves; all else is acc in err.
void stream(const TopkJob& job, std::vector<Part>& parts, const Lists& lists, Guess guess, bool first) {
  const Leaves& isa = leaves();
  share_parts(static_cast<int>(parts.size()), job.threads, kMany, [&](int t) {
    Part& part = parts[static_cast<size_t>(t)];
    const Candidates& room = lists.room(static_cast<size_t>(t));
    part.listed = part.ties = 0;
    part.overflow = false;
    for (Piece& piece : part.pieces) {
      piece.list = {
          room.values + part.listed, room.indices + part.listed, room.capacity - part.listed, 0, 0, false};
      isa.topk_stream(first ? piece.grad : nullptr, piece.dtype, piece.err, piece.count, guess,
                      job.value_dtype, &piece.list);
      part.listed += piece.list.count;
      part.ties += piece.list.ties;
      part.overflow |= piece.list.overflow;
    }
  });
}

void restore(const TopkJob& job, std::vector<Part>& parts) {
  share_parts(static_cast<int>(parts.size()), job.threads, kMany, [&](int t) {
    for (const Piece& piece : parts[static_cast<size_t>(t)].pieces) {
      for (int64_t j = 0; j < piece.list.count; ++j) piece.err[piece.list.indices[j]] = piece.list.values[j];
    }
  });
}

// Puts winners of one part to the payload in order, and what is left of each candidate to err.
class Emitter {
 public:
  Emitter(const TopkJob& job, int32_t threshold, const Slot& slot)
      : job_(job),
        threshold_(threshold),
        offset_(slot.offset),
        end_(slot.offset + slot.winners),
        quota_(slot.quota) {}

  // Candidates that were taken out of err, a run that begins at index `base`. What a winner leaves is there
  // already: to write it now would touch another cache line for each.
  void emit(const Candidates& list, float* err, int64_t base) {
    if (!job_.wide_indices) {
      const int64_t size = job_.value_dtype == Dtype::fp32 ? 4 : 2;
      Winners winners{threshold_,
                      quota_,
                      static_cast<char*>(job_.values) + offset_ * size,
                      job_.value_dtype,
                      static_cast<int32_t*>(job_.indices) + offset_,
                      end_ - offset_};
      cleared_ += leaves().topk_emit(list, err, static_cast<int32_t>(base), &winners);
      offset_ = end_ - winners.left;
      quota_ = winners.quota;
      return;
    }
    for (int64_t j = 0; j < list.count; ++j) {
      const float acc = list.values[j];
      float& place = err[list.indices[j]];
      const int32_t key = key_of(acc);
      if (key > threshold_ || (key == threshold_ && quota_ > 0)) {
        quota_ -= key == threshold_;
        put(acc, base + list.indices[j]);
      } else {
        place = residual(acc);
      }
    }
  }

  // The entries of err[begin, end) itself, of a run whose first entry has index `base`. A tile is taken
  // out and put back like a list, which is fast even where most of it wins or is not finite.
  void scan(float* err, int64_t begin, int64_t end, int64_t base) {
    float values[kTile + kSpare + kBehind];
    uint32_t indices[kTile + kSpare + kBehind];
    for (int64_t at = begin; at < end; at += kTile) {
      Candidates tile{values, indices, kTile + kSpare, 0, 0, false};
      const int32_t wanted = quota_ > 0 ? threshold_ : threshold_ + 1;
      leaves().topk_stream(nullptr, Dtype::fp32, err + at, std::min(kTile, end - at),
                           {std::min(wanted, kInfKey), false, true}, job_.value_dtype, &tile);
      emit(tile, err + at, base + at);
    }
  }

  // All of a piece, without looking for winners.
  void put_all(const Piece& piece) {
    const int64_t size = piece.dtype == Dtype::fp32 ? 4 : 2;
    float acc[kTile];
    for (int64_t at = 0; at < piece.count; at += kTile) {
      const int64_t count = std::min(kTile, piece.count - at);
      leaves().add(static_cast<const char*>(piece.grad) + at * size, piece.dtype, piece.err + at, count, acc);
      if (job_.value_dtype != Dtype::fp32 || job_.wide_indices) {
        for (int64_t i = 0; i < count; ++i) piece.err[at + i] = put(acc[i], piece.begin + at + i);
        continue;
      }
      auto* values = static_cast<float*>(job_.values) + offset_;
      auto* indices = static_cast<int32_t*>(job_.indices) + offset_;
      const auto first = static_cast<int32_t>(piece.begin + at);
      int32_t wild = 0;
      for (int32_t i = 0; i < count; ++i) {
        values[i] = acc[i] == acc[i] ? acc[i] : float_of(kNanKey);
        indices[i] = first + i;
        wild += static_cast<int32_t>(bits_of(acc[i]) & 0x7fffffffu) >= kInfKey;
      }
      std::fill_n(piece.err + at, count, 0.0f);
      cleared_ += wild;
      offset_ += count;
    }
  }

  bool ties_left() const { return quota_ > 0; }
  int64_t cleared() const { return cleared_; }

 private:
  float residual(float r) {
    if (std::isfinite(r)) return r;
    ++cleared_;
    return 0.0f;
  }

  float put(float acc, int64_t index) {
    const float sent = store_rounded(job_.values, job_.value_dtype, offset_, acc);
    if (job_.wide_indices) {
      static_cast<int64_t*>(job_.indices)[offset_++] = index;
    } else {
      static_cast<int32_t*>(job_.indices)[offset_++] = static_cast<int32_t>(index);
    }
    return residual(acc - sent);
  }

  const TopkJob& job_;
  int32_t threshold_;
  int64_t offset_, end_, quota_, cleared_ = 0;
};

void populate_slot(const TopkJob& job, const Slot& slot) {
  if (slot.winners < kFreshResult) return;
  const int64_t value = job.value_dtype == Dtype::fp32 ? 4 : 2, index = job.wide_indices ? 8 : 4;
  populate(static_cast<char*>(job.values) + slot.offset * value, static_cast<size_t>(slot.winners * value));
  populate(static_cast<char*>(job.indices) + slot.offset * index, static_cast<size_t>(slot.winners * index));
}

template <typename F>
void emit_parts(const TopkJob& job, std::vector<Part>& parts, const Selection& selection, int64_t entries,
                F each_piece) {
  const std::vector<Slot> slots = slots_of(selection);
  share_parts(static_cast<int>(parts.size()), job.threads, entries, [&](int t) {
    const auto p = static_cast<size_t>(t);
    populate_slot(job, slots[p]);
    Emitter emitter(job, selection.threshold.key, slots[p]);
    for (Piece& piece : parts[p].pieces) each_piece(piece, emitter);
    parts[p].cleared = emitter.cleared();
  });
}

// All that is listed wins, and ties fill up from err, where they were left.
void emit_with_ties(const TopkJob& job, std::vector<Part>& parts, const Selection& selection) {
  emit_parts(job, parts, selection, kMany, [](Piece& piece, Emitter& emitter) {
    const Candidates& list = piece.list;
    int64_t taken = 0, at = 0;
    for (; at < piece.count && emitter.ties_left(); at += kTile) {
      const int64_t end = std::min(at + kTile, piece.count);
      for (; taken < list.count && list.indices[taken] < end; ++taken) {
        piece.err[list.indices[taken]] = list.values[taken];
      }
      emitter.scan(piece.err, at, end, piece.begin);
    }
    const Candidates rest{list.values + taken, list.indices + taken, 0, list.count - taken, 0, false};
    emitter.emit(rest, piece.err, piece.begin);
  });
}

// Winners and all, err holds all of acc.
void emit_from_err(const TopkJob& job, std::vector<Part>& parts, const Selection& selection) {
  emit_parts(job, parts, selection, kMany,
             [](Piece& piece, Emitter& emitter) { emitter.scan(piece.err, 0, piece.count, piece.begin); });
}

std::vector<Group> groups_of(const std::vector<Part>& parts) {
  std::vector<Group> groups;
  for (const Part& part : parts) {
    groups.emplace_back();
    for (const Piece& piece : part.pieces) groups.back().push_back({piece.err, piece.count});
  }
  return groups;
}

// Selects with the help of a guess; nothing where the guess was wrong: err then holds all of acc.
std::optional<int32_t> select_with(const TopkJob& job, std::vector<Part>& parts, const Lists& lists,
                                   const Sampled& sampled, bool first) {
  const Guess guess = sampled.guess;
  stream(job, parts, lists, guess, first);
  int64_t listed = 0, ties = 0;
  bool overflow = false;
  for (const Part& part : parts) {
    listed += part.listed;
    ties += part.ties;
    overflow |= part.overflow;
  }
  // Above infinity the list would leave out entries that must not stay in err.
  const bool all_wild_listed = guess.threshold <= kInfKey;
  if (!overflow && listed >= job.k && all_wild_listed) {
    std::vector<Segment> segments;
    for (size_t p = 0; p < parts.size(); ++p) segments.push_back({lists.room(p).values, parts[p].listed});
    const Selection selection =
        select_near(segments, job.k, guess.threshold, sampled.high, lists.keys(), job.threads);
    emit_parts(job, parts, selection, kPlaceCost * listed,
               [](Piece& piece, Emitter& emitter) { emitter.emit(piece.list, piece.err, piece.begin); });
    return selection.threshold.key;
  }
  const bool known = !overflow && listed < job.k && job.k <= listed + ties;
  Selection selection{{guess.threshold - 1, job.k - listed}, {}};
  for (const Part& part : parts) selection.shares.push_back({part.listed, part.ties});
  if (known && all_wild_listed) {
    emit_with_ties(job, parts, selection);
    return selection.threshold.key;
  }
  restore(job, parts);
  if (!known) return std::nullopt;
  emit_from_err(job, parts, selection);
  return selection.threshold.key;
}

// Few entries, one thread: the k-th largest of the maxima of at least k groups is a threshold that k entries
// reach, and with four times k groups few more do.
int32_t select_small(const TopkJob& job, std::vector<Part>& parts) {
  const int64_t size = std::max<int64_t>(1, job.numel / (4 * job.k));  // entries a group
  int64_t groups = 0;
  for (const Piece& piece : parts[0].pieces) groups += ((piece.count - 1) / (kLanes * size) + 1) * kLanes;
  const Lists lists(parts, job.numel, groups);
  float* next = lists.more();
  for (const Piece& piece : parts[0].pieces) {
    leaves().topk_maxima(piece.grad, piece.dtype, piece.err, piece.count, size, next);
    next += ((piece.count - 1) / (kLanes * size) + 1) * kLanes;
  }
  const int32_t low = kth_largest({{{lists.more(), groups}}}, job.k, 1).key;
  const auto threshold =
      select_with(job, parts, lists, {{std::min(low, kInfKey), false, false}, INT32_MAX}, false);
  return *threshold;
}

int32_t select(const TopkJob& job, std::vector<Part>& parts) {
  if (job.k == job.numel) {
    Selection all{{-1, 0}, {}};
    for (const Part& part : parts) all.shares.push_back({part.count, 0});
    emit_parts(job, parts, all, job.numel, [](Piece& piece, Emitter& emitter) { emitter.put_all(piece); });
    return 0;
  }
  if (job.numel < kMinSampled) return select_small(job, parts);
  if (job.k <= job.numel / 2) {
    // Four times k: clustered gradients make a guess low, and one part may hold all that is listed.
    const Lists lists(parts, 4 * job.k + kMinSampled);
    const bool hinted = job.hint != nullptr && *job.hint > 0;
    const Sampled first =
        hinted ? guess_by_hint(*job.hint, job.numel, job.k) : guess_by_sample(job.runs, job.numel, job.k, 0);
    if (const auto threshold = select_with(job, parts, lists, first, true)) return *threshold;
    std::vector<TopkRun> runs = job.runs;
    for (TopkRun& run : runs) run.grad = nullptr;
    const Sampled second = guess_by_sample(runs, job.numel, job.k, 1);
    if (const auto threshold = select_with(job, parts, lists, second, false)) return *threshold;
  } else {
    stream(job, parts, Lists(parts, 0), kNothing, true);
  }
  const Selection selection = select_largest(groups_of(parts), job.k, job.threads);
  emit_from_err(job, parts, selection);
  return selection.threshold.key;
}

}  // namespace

int64_t topk_compress(const TopkJob& job) {
  const KeepDenormals guard;
  std::vector<Part> parts = parts_of(job);
  const int32_t threshold = select(job, parts);
  if (job.hint != nullptr) *job.hint = threshold;
  int64_t cleared = 0;
  for (const Part& part : parts) cleared += part.cleared;
  return cleared;
}

int64_t topk_compress_each(std::vector<TopkJob> jobs, int threads) {
  int64_t cleared = 0;
  std::vector<TopkJob> small;
  for (TopkJob& job : jobs) {
    job.threads = job.numel < kAlone ? 1 : threads;
    if (job.numel < kAlone) {
      small.push_back(job);
    } else {
      cleared += topk_compress(job);
    }
  }
  std::atomic<bool> out_of_memory{false};
  const int count = static_cast<int>(small.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : cleared) if (count > 1)
  for (int i = 0; i < count; ++i) {
    try {
      cleared += topk_compress(small[static_cast<size_t>(i)]);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
  return cleared;
}

}  // namespace gck
