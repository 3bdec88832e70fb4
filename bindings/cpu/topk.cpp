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
#include "cpu/select.hpp"
#include "cpu/threads.hpp"
#include "cpu/topk_emit.hpp"
#include "cpu/topk_guess.hpp"
#include "cpu/topk_parts.hpp"

namespace gck {
namespace {

constexpr int64_t kMinSampled = 1 << 16;  // below, the whole vector is as near as a sample
constexpr int64_t kLanes = 16;            // that topk_maxima keeps apart
constexpr int64_t kAlone = 1 << 19;       // below, a tensor of a list is worked on by one thread
constexpr int64_t kFair = 4;              // tensors a thread has at least to take, if they are larger
constexpr int64_t kMany = INT64_MAX;      // for share_parts: worth all threads
constexpr int64_t kPlaceCost = 8;         // of an entry that is emitted, against one that is looked at

// Lists nothing: with ties counted every NaN is the one that gck lets out, whose key is below.
constexpr Guess kNothing{kNanKey + 1, true, false, kNanKey + 1};

// Streams a piece whose residual is read with options, a tile at a time.
void stream_tiles(const TopkJob& job, Piece& piece, Guess guess) {
  const int64_t size = piece.dtype == Dtype::fp32 ? 4 : 2;
  for (int64_t at = 0; at < piece.count; at += kResidualTile) {
    const int64_t count = std::min(kResidualTile, piece.count - at), listed = piece.list.count;
    const auto* grad = static_cast<const char*>(piece.grad) + at * size;
    job.residual->before(grad, piece.dtype, piece.err + at, piece.begin + at, count);
    leaves().topk_stream(grad, piece.dtype, piece.err + at, count, guess, job.value_dtype, &piece.list);
    for (int64_t j = listed; j < piece.list.count; ++j) piece.list.indices[j] += static_cast<uint32_t>(at);
  }
}

// What is listed and expected to win has left err but for what a winner leaves; all else is acc in err.
void stream(const TopkJob& job, std::vector<Part>& parts, const Lists& lists, Guess guess, bool first) {
  const Leaves& isa = leaves();
  share_parts(static_cast<int>(parts.size()), job.threads, kMany, [&](int t) {
    Part& part = parts[static_cast<size_t>(t)];
    part.listed = part.ties = 0;
    part.overflow = false;
    for (Piece& piece : part.pieces) {
      piece.list = lists.rest_of(static_cast<size_t>(t), part.listed);
      if (first && job.residual) {
        stream_tiles(job, piece, guess);
      } else {
        isa.topk_stream(first ? piece.grad : nullptr, piece.dtype, piece.err, piece.count, guess,
                        job.value_dtype, &piece.list);
      }
      part.listed += piece.list.count;
      part.ties += piece.list.ties;
      part.overflow |= piece.list.overflow;
    }
  });
}

struct Listed {
  int64_t count = 0, ties = 0;
  bool overflow = false;
};

Listed listed_in(const std::vector<Part>& parts) {
  Listed all;
  for (const Part& part : parts) {
    all.count += part.listed;
    all.ties += part.ties;
    all.overflow |= part.overflow;
  }
  return all;
}

void restore(const TopkJob& job, std::vector<Part>& parts) {
  share_parts(static_cast<int>(parts.size()), job.threads, kMany, [&](int t) {
    for (const Piece& piece : parts[static_cast<size_t>(t)].pieces) {
      for (int64_t j = 0; j < piece.list.count; ++j) piece.err[piece.list.indices[j]] = piece.list.values[j];
    }
  });
}

// All that is listed wins, and ties fill up from err, where they were left.
void emit_with_ties(const TopkJob& job, std::vector<Part>& parts, const Selection& selection,
                    int32_t expected) {
  emit_parts(job, parts, selection, kMany, [expected](Piece& piece, Emitter& emitter) {
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
    emitter.emit(rest, piece.err, piece.begin, expected);
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

Selection select_listed(const TopkJob& job, const std::vector<Part>& parts, const Lists& lists,
                        const Sampled& sampled) {
  std::vector<Segment> segments;
  for (size_t p = 0; p < parts.size(); ++p) segments.push_back({lists.room(p).values, parts[p].listed});
  return select_near(segments, job.k, sampled.guess.threshold, sampled.high, lists.keys(), job.threads);
}

// Selects with the help of a guess; nothing where the guess was wrong: err then holds all of acc.
std::optional<int32_t> select_with(const TopkJob& job, std::vector<Part>& parts, const Lists& lists,
                                   const Sampled& sampled, bool first) {
  const Guess guess = sampled.guess;
  stream(job, parts, lists, guess, first);
  const auto [listed, ties, overflow] = listed_in(parts);
  // Above infinity the list would leave out entries that must not stay in err.
  const bool all_wild_listed = guess.threshold <= kInfKey;
  if (!overflow && listed >= job.k && all_wild_listed) {
    const Selection selection = select_listed(job, parts, lists, sampled);
    emit_parts(job, parts, selection, kPlaceCost * listed, [&](Piece& piece, Emitter& emitter) {
      emitter.emit(piece.list, piece.err, piece.begin, guess.expected);
    });
    return selection.threshold.key;
  }
  const bool known = !overflow && listed < job.k && job.k <= listed + ties;
  Selection selection{{guess.threshold - 1, job.k - listed}, {}};
  for (const Part& part : parts) selection.shares.push_back({part.listed, part.ties});
  if (known && all_wild_listed) {
    emit_with_ties(job, parts, selection, guess.expected);
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
  const Lists lists(parts, job.numel, static_cast<size_t>(groups) * sizeof(float));
  auto* const maxima = static_cast<float*>(lists.more());
  float* next = maxima;
  for (const Piece& piece : parts[0].pieces) {
    if (job.residual) job.residual->before(piece.grad, piece.dtype, piece.err, piece.begin, piece.count);
    leaves().topk_maxima(piece.grad, piece.dtype, piece.err, piece.count, size, next);
    next += ((piece.count - 1) / (kLanes * size) + 1) * kLanes;
  }
  // Of many groups not the exact one, which takes longer to find than a few more entries to look at.
  const int64_t slack = size > 1 ? job.k / 8 : 0;
  const int32_t low = std::min(leaves().topk_kth(maxima, groups, job.k, slack), kInfKey);
  const auto threshold = select_with(job, parts, lists, {{low, false, true, low}, INT32_MAX}, false);
  return *threshold;
}

// Four times k: clustered gradients make a guess low, and one part may hold all that is listed.
Lists lists_for_sample(const TopkJob& job, const std::vector<Part>& parts) {
  return {parts, 4 * job.k + kMinSampled, bytes_for_sample(job.numel, job.k, job.threads)};
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
    const Lists lists = lists_for_sample(job, parts);
    const bool hinted = job.hint != nullptr && *job.hint > 0;
    const Sampled first =
        hinted ? guess_by_hint(*job.hint, job.numel, job.k)
               : guess_by_sample(job.runs, job.numel, job.k, 0, job.threads, lists.more(), job.residual);
    if (const auto threshold = select_with(job, parts, lists, first, true)) return *threshold;
    std::vector<TopkRun> runs = job.runs;
    for (TopkRun& run : runs) run.grad = nullptr;
    const Sampled second = guess_by_sample(runs, job.numel, job.k, 1, job.threads, lists.more());
    if (const auto threshold = select_with(job, parts, lists, second, false)) return *threshold;
  } else {
    stream(job, parts, Lists(parts, 0), kNothing, true);
  }
  const Selection selection = select_largest(groups_of(parts), job.k, job.threads);
  emit_from_err(job, parts, selection);
  return selection.threshold.key;
}

// acc^2 - err^2 of the entries that were sent, by blocks of kBlock of them; of one that is not finite as it
// travels, nothing. acc is the sum of what travels and what stays, exactly.
void sum_sent(const TopkJob& job, std::vector<double>& sent) {
  const bool rounds = job.value_dtype != Dtype::fp32;
  const int parts = parts_for(job.k, job.threads);
  for_each_part(parts, [&](int t) {
    const auto [begin, end] = part_of(job.k, parts, t, kBlock);
    for (int64_t first = begin; first < end; first += kBlock) {
      double tree[kBlock] = {};
      for (int64_t i = 0; i < std::min(kBlock, end - first); ++i) {
        const int64_t j = first + i;
        const float value = load_widened(job.values, job.value_dtype, j);
        if (!std::isfinite(value)) continue;
        const int64_t index =
            job.wide_indices ? static_cast<int64_t*>(job.indices)[j] : static_cast<int32_t*>(job.indices)[j];
        const double left = rounds ? job.runs[0].err[index] : 0.0f, acc = value + left;
        tree[i] = acc * acc - left * left;
      }
      for (int64_t half = kBlock / 2; half >= 1; half /= 2) {
        for (int64_t i = 0; i < half; ++i) tree[i] += tree[i + half];
      }
      sent[static_cast<size_t>(first / kBlock)] = tree[0];
    }
  });
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

bool topk_preview(const TopkJob& job) {
  if (job.numel < kMinSampled || job.k > job.numel / 2) return false;
  const KeepDenormals guard;
  std::vector<Part> parts = parts_of(job);
  const Lists lists = lists_for_sample(job, parts);
  const Sampled sampled = guess_by_sample(job.runs, job.numel, job.k, 0, job.threads, lists.more());
  if (sampled.guess.ties) return false;
  share_parts(static_cast<int>(parts.size()), job.threads, kMany, [&](int t) {
    const auto p = static_cast<size_t>(t);
    for (Piece& piece : parts[p].pieces) {
      piece.list = lists.rest_of(p, parts[p].listed);
      leaves().topk_look(piece.grad, piece.dtype, piece.err, piece.count, sampled.guess, &piece.list);
      parts[p].listed += piece.list.count;
      parts[p].overflow |= piece.list.overflow;
    }
  });
  const Listed listed = listed_in(parts);
  if (listed.overflow || listed.count < job.k) return false;
  const Selection selection = select_listed(job, parts, lists, sampled);
  emit_parts(job, parts, selection, kPlaceCost * listed.count,
             [&](Piece& piece, Emitter& emitter) { emitter.emit(piece.list, nullptr, piece.begin, 0); });
  return true;
}

int64_t topk_compress(TopkJob job, const ResidualOptions& options) {
  ResidualPass residual(job.numel, options);
  if (residual.idle()) return topk_compress(job);
  job.residual = &residual;
  std::vector<double> sent;
  if (residual.measures()) sent = ResidualPass::blocks_of(job.k);
  const int64_t cleared = topk_compress(job);
  if (residual.measures()) {
    sum_sent(job, sent);
    residual.finish_sent(job.k, std::move(sent));
  }
  return cleared;
}

int64_t topk_compress_each(std::vector<TopkJob> jobs, const ResidualOptions& options, int threads) {
  ResidualPass residual(0, options);  // which reads alone, the same of all
  int64_t total = 0, cleared = 0;
  for (TopkJob& job : jobs) {
    total += job.numel;
    if (!residual.idle()) job.residual = &residual;
  }
  // Whole tensors to threads, as long as that shares the work out evenly: then nobody waits for anybody.
  std::vector<TopkJob> small;
  for (TopkJob& job : jobs) {
    if (job.numel < kAlone || job.numel <= total / (kFair * threads)) {
      job.threads = 1;
      small.push_back(job);
    } else {
      job.threads = threads;
      cleared += topk_compress(job);
    }
  }
  std::stable_sort(small.begin(), small.end(),
                   [](const TopkJob& a, const TopkJob& b) { return a.numel > b.numel; });
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
