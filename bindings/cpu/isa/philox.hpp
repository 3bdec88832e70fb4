// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), 32 numbers at a time:
// element i has word i % 4 of what becomes of the counter i / 4.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

constexpr uint32_t kPhiloxFactor[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxKeyStep[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int kPhiloxRounds = 10;
constexpr int64_t kDraw = 32;

// Numbers of the elements [at, at + 32), at a multiple of 32: multiples of 2^-24 in [0, 1), the upper 24
// bits of each word.
struct Draw {
  Vec first, second;
};

// RandomWords are those of 32 elements, in their order: of the counters [counter, counter + 8), a multiple
// of 8.

#if defined(GCK_AVX512) || defined(GCK_AVX2)

// A lane of 64 bits holds a counter's word in its lower half; what is in the upper half, no product sees.
#if defined(GCK_AVX512)
using Wide = __m512i;
inline Wide wide(uint32_t x) { return _mm512_set1_epi64(x); }
inline Wide product(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
inline Wide exclusive(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
inline Wide upper(Wide a) { return _mm512_srli_epi64(a, 32); }
inline Wide plus(Wide a, Wide b) { return _mm512_add_epi64(a, b); }
inline Wide wide64(int64_t x) { return _mm512_set1_epi64(x); }
inline Wide lane_numbers() { return _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7); }
inline void store_wide(void* p, Wide a) { _mm512_storeu_si512(p, a); }
#else
using Wide = __m256i;
inline Wide wide(uint32_t x) { return _mm256_set1_epi64x(x); }
inline Wide product(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
inline Wide exclusive(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
inline Wide upper(Wide a) { return _mm256_srli_epi64(a, 32); }
inline Wide plus(Wide a, Wide b) { return _mm256_add_epi64(a, b); }
inline Wide wide64(int64_t x) { return _mm256_set1_epi64x(x); }
inline Wide lane_numbers() { return _mm256_setr_epi64x(0, 1, 2, 3); }
inline void store_wide(void* p, Wide a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
#endif

struct Words {
  Wide x[4];
};

// The keys of all rounds: of one seed, made once.
struct Keys {
  Wide round[kPhiloxRounds][2];

  explicit Keys(uint64_t seed) {
    auto key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
    for (auto& keys : round) {
      keys[0] = wide(key_0);
      keys[1] = wide(key_1);
      key_0 += kPhiloxKeyStep[0];
      key_1 += kPhiloxKeyStep[1];
    }
  }
};

inline void philox(Words& w, const Keys& keys) {
  const Wide factor_0 = wide(kPhiloxFactor[0]), factor_1 = wide(kPhiloxFactor[1]);
#pragma GCC unroll 10
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const Wide p = product(w.x[0], factor_0), q = product(w.x[2], factor_1);
    w = {{exclusive(exclusive(upper(q), w.x[1]), keys.round[r][0]), q,
          exclusive(exclusive(upper(p), w.x[3]), keys.round[r][1]), p}};
  }
}

#endif

#if defined(GCK_AVX512)

struct RandomWords {
  Wide first, second;
};

inline RandomWords random_words(const Keys& keys, uint64_t counter) {
  // In the order that lets the words of counters 0 to 3 come out of one interleaving, and 4 to 7 of the
  // other.
  const Wide lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  Words w{{_mm512_add_epi64(lane, wide(static_cast<uint32_t>(counter))),
           wide(static_cast<uint32_t>(counter >> 32)), _mm512_setzero_si512(), _mm512_setzero_si512()}};
  philox(w, keys);
  const auto pair = [](Wide even, Wide odd) {
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  };
  const Wide front = pair(w.x[0], w.x[1]), back = pair(w.x[2], w.x[3]);
  return {_mm512_unpacklo_epi64(front, back), _mm512_unpackhi_epi64(front, back)};
}

inline Wide words_at(const RandomWords& words, int64_t i) { return i ? words.second : words.first; }

inline Vec to_uniform(Wide words) {
  return {_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(words, 8)), _mm512_set1_ps(0x1p-24f))};
}

inline Draw to_uniform(const RandomWords& words) {
  return {to_uniform(words.first), to_uniform(words.second)};
}

#elif defined(GCK_AVX2)

struct RandomWords {
  Wide quarter[4];
};

inline RandomWords random_words(const Keys& keys, uint64_t counter) {
  // In the order that lets the words of counters 0 and 1 come out of one interleaving, 2 and 3 of the other.
  const Wide lane = _mm256_setr_epi64x(0, 2, 1, 3), high = wide(static_cast<uint32_t>(counter >> 32));
  const Wide low = _mm256_add_epi64(lane, wide(static_cast<uint32_t>(counter)));
  Words a{{low, high, _mm256_setzero_si256(), _mm256_setzero_si256()}};
  Words b{{_mm256_add_epi64(low, wide(4)), high, _mm256_setzero_si256(), _mm256_setzero_si256()}};
  philox(a, keys);
  philox(b, keys);
  const auto pair = [](Wide even, Wide odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  };
  const Wide front_a = pair(a.x[0], a.x[1]), back_a = pair(a.x[2], a.x[3]);
  const Wide front_b = pair(b.x[0], b.x[1]), back_b = pair(b.x[2], b.x[3]);
  return {{_mm256_unpacklo_epi64(front_a, back_a), _mm256_unpackhi_epi64(front_a, back_a),
           _mm256_unpacklo_epi64(front_b, back_b), _mm256_unpackhi_epi64(front_b, back_b)}};
}

inline Wide words_at(const RandomWords& words, int64_t i) { return words.quarter[i]; }

inline __m256 to_uniform(Wide words) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8)), _mm256_set1_ps(0x1p-24f));
}

inline Draw to_uniform(const RandomWords& words) {
  const Wide* q = words.quarter;
  return {{to_uniform(q[0]), to_uniform(q[1])}, {to_uniform(q[2]), to_uniform(q[3])}};
}

#else

struct Keys {
  uint64_t seed;
};

struct RandomWords {
  uint32_t x[kDraw];
};

inline RandomWords random_words(const Keys& keys, uint64_t counter) {
  RandomWords words;
  for (uint32_t c = 0; c < kDraw / 4; ++c) {
    auto key_0 = static_cast<uint32_t>(keys.seed), key_1 = static_cast<uint32_t>(keys.seed >> 32);
    uint32_t x[4] = {static_cast<uint32_t>(counter) + c, static_cast<uint32_t>(counter >> 32), 0, 0};
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const uint64_t p = static_cast<uint64_t>(x[0]) * kPhiloxFactor[0];
      const uint64_t q = static_cast<uint64_t>(x[2]) * kPhiloxFactor[1];
      x[0] = static_cast<uint32_t>(q >> 32) ^ x[1] ^ key_0;
      x[1] = static_cast<uint32_t>(q);
      x[2] = static_cast<uint32_t>(p >> 32) ^ x[3] ^ key_1;
      x[3] = static_cast<uint32_t>(p);
      key_0 += kPhiloxKeyStep[0];
      key_1 += kPhiloxKeyStep[1];
    }
    std::memcpy(words.x + 4 * c, x, sizeof x);
  }
  return words;
}

inline void store_words(uint64_t* p, const RandomWords& words) {
  for (int i = 0; i < kDraw / 2; ++i) p[i] = words.x[2 * i] | static_cast<uint64_t>(words.x[2 * i + 1]) << 32;
}

inline Draw to_uniform(const RandomWords& words) {
  float uniform[kDraw];
  for (int i = 0; i < kDraw; ++i) uniform[i] = static_cast<float>(words.x[i] >> 8) * 0x1p-24f;
  return {load(uniform), load(uniform + kLanes)};
}

#endif

#if defined(GCK_AVX512) || defined(GCK_AVX2)
inline void store_words(uint64_t* p, const RandomWords& words) {
  constexpr int64_t each = sizeof(Wide) / 8;
  for (int64_t i = 0; i < kDraw / 2; i += each) store_wide(p + i, words_at(words, i / each));
}
#endif

inline Draw draw(const Keys& keys, int64_t at) {
  return to_uniform(random_words(keys, static_cast<uint64_t>(at) / 4));
}

}  // namespace gck::GCK_ISA
