// The last step of top-k: winners to the payload in order of index, and what is left of each candidate to
// err.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/copy.hpp"
#include "cpu/isa/leaves.hpp"
#include "cpu/round.hpp"
#include "cpu/scratch.hpp"
#include "cpu/select.hpp"
#include "cpu/threads.hpp"
#include "cpu/topk_parts.hpp"

namespace gck {

constexpr int64_t kTile = 4096;            // entries looked at together where err itself is emitted from
constexpr int64_t kFreshResult = 1 << 14;  // winners of a part whose pages are worth asking for at once,
                                           // and which are worth writing past the caches

// Puts winners of one part to the payload in order, and what is left of each candidate to err.
class Emitter {
 public:
  Emitter(const TopkJob& job, int32_t threshold, const Slot& slot)
      : job_(job),
        threshold_(threshold),
        offset_(slot.offset),
        end_(slot.offset + slot.winners),
        quota_(slot.quota) {}

  // Candidates of err, a run that begins at index `base`, that were listed with the guess that `expected` is
  // of. What most of them leave is there already: to write it now would touch another cache line for each.
  // No err: it stays as it is.
  void emit(const Candidates& list, float* err, int64_t base, int32_t expected) {
    if (!job_.wide_indices) {
      const int64_t size = job_.value_dtype == Dtype::fp32 ? 4 : 2;
      Winners winners{
          threshold_,       expected,
          quota_,           static_cast<char*>(job_.values) + offset_ * size,
          job_.value_dtype, static_cast<int32_t*>(job_.indices) + offset_,
          end_ - offset_,   list.count >= kFreshResult && is_past_caches(2 * job_.k, job_.threads)};
      cleared_ += leaves().topk_emit(list, err, static_cast<int32_t>(base), &winners);
      offset_ = end_ - winners.left;
      quota_ = winners.quota;
      return;
    }
    for (int64_t j = 0; j < list.count; ++j) {
      const float acc = list.values[j];
      const int32_t key = key_of(acc);
      const bool wins = key > threshold_ || (key == threshold_ && quota_ > 0);
      quota_ -= wins && key == threshold_;
      const float left = wins ? put(acc, base + list.indices[j]) : residual(acc);
      if (err != nullptr && wins != (key >= expected)) err[list.indices[j]] = left;
    }
  }

  // The entries of err[begin, end) itself, of a run whose first entry has index `base`. A tile is taken
  // out and put back like a list, which is fast even where most of it wins or is not finite.
  void scan(float* err, int64_t begin, int64_t end, int64_t base) {
    float values[kTile + kSpare + kBehind];
    uint32_t indices[kTile + kSpare + kBehind];
    for (int64_t at = begin; at < end; at += kTile) {
      if (offset_ == end_) {  // all that is left to do, wherever winners come first
        cleared_ += leaves().topk_clear(err + at, end - at);
        return;
      }
      Candidates tile{values, indices, kTile + kSpare, 0, 0, false};
      const int32_t wanted = quota_ > 0 ? threshold_ : threshold_ + 1;
      const int32_t key = std::min(wanted, kInfKey);
      leaves().topk_stream(nullptr, Dtype::fp32, err + at, std::min(kTile, end - at), {key, false, true, key},
                           job_.value_dtype, &tile);
      emit(tile, err + at, base + at, key);
    }
  }

  // All of a piece, without looking for winners.
  void put_all(const Piece& piece) {
    const int64_t size = piece.dtype == Dtype::fp32 ? 4 : 2;
    float acc[kTile];
    for (int64_t at = 0; at < piece.count; at += kTile) {
      const int64_t count = std::min(kTile, piece.count - at);
      const auto* grad = static_cast<const char*>(piece.grad) + at * size;
      if (job_.residual) job_.residual->before(grad, piece.dtype, piece.err + at, piece.begin + at, count);
      leaves().add(grad, piece.dtype, piece.err + at, count, acc);
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

inline void populate_slot(const TopkJob& job, const Slot& slot) {
  if (slot.winners < kFreshResult) return;
  const int64_t value = job.value_dtype == Dtype::fp32 ? 4 : 2, index = job.wide_indices ? 8 : 4;
  populate(static_cast<char*>(job.values) + slot.offset * value, static_cast<size_t>(slot.winners * value));
  populate(static_cast<char*>(job.indices) + slot.offset * index, static_cast<size_t>(slot.winners * index));
}

// Calls each_piece(piece, emitter) for the pieces of each part, with an emitter that puts the part's winners
// where they belong. `entries`: for share_parts.
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

}  // namespace gck
