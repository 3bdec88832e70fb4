// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), 32 words at a time:
// word i is number i % 4 of what becomes of the counter i / 4.
#pragma once

#include "cpu/isa/vec.hpp"

namespace gck::GCK_ISA {

constexpr uint32_t kPhiloxFactor[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxKeyStep[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int kPhiloxRounds = 10;
constexpr int64_t kDraw = 32;

// RandomWords are the 32 of the counters [counter, counter + 8), a multiple of 8, in their order. N of them
// are those of N * 8 counters, which have one upper half.
#if defined(GCK_AVX512) || defined(GCK_AVX2)

// A lane of 64 bits holds a counter's word in its lower half; what is in the upper half, no product sees.
#if defined(GCK_AVX512)
using Wide = __m512i;
inline Wide wide(uint32_t x) { return _mm512_set1_epi64(x); }
inline Wide product(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
inline Wide exclusive(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
inline Wide exclusive(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
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
inline Wide exclusive(Wide a, Wide b, Wide c) { return exclusive(exclusive(a, b), c); }
inline Wide upper(Wide a) { return _mm256_srli_epi64(a, 32); }
inline Wide plus(Wide a, Wide b) { return _mm256_add_epi64(a, b); }
inline Wide wide64(int64_t x) { return _mm256_set1_epi64x(x); }
inline Wide lane_numbers() { return _mm256_setr_epi64x(0, 1, 2, 3); }
inline void store_wide(void* p, Wide a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
#endif

struct Words {
  Wide x[4];
};

// The keys of all rounds: of one seed, made once. And what is the same in all lanes after two rounds, because
// counters have no words but two, and the second one is common to them.
struct Keys {
  Wide round[kPhiloxRounds][2];
  Wide second_2, third_2;  // keys of x[2], with the part of a product that is common
  uint32_t high;           // the counters' second word

  explicit Keys(uint64_t seed)
      : seed_1(static_cast<uint32_t>(seed >> 32)), seed_0(static_cast<uint32_t>(seed)) {
    auto key_0 = seed_0, key_1 = seed_1;
    for (auto& keys : round) {
      keys[0] = wide(key_0);
      keys[1] = wide(key_1);
      key_0 += kPhiloxKeyStep[0];
      key_1 += kPhiloxKeyStep[1];
    }
    begin(0);
  }

  void begin(uint32_t second_word) {
    high = second_word;
    const uint64_t common = static_cast<uint64_t>(high ^ seed_0) * kPhiloxFactor[0];
    second_2 = wide((seed_1 + kPhiloxKeyStep[1]) ^ static_cast<uint32_t>(common >> 32));
    third_2 = wide((seed_1 + 2 * kPhiloxKeyStep[1]) ^ static_cast<uint32_t>(common));
  }

 private:
  uint32_t seed_1, seed_0;
};

// Of N vectors of counters with the first words x: what the last round starts from. Step by step together,
// because each vector has to wait for its products.
template <int N>
GCK_INLINE void nine_rounds(const Wide (&x)[N], const Keys& keys, Words (&w)[N]) {
  const Wide factor_0 = wide(kPhiloxFactor[0]), factor_1 = wide(kPhiloxFactor[1]);
  for (int i = 0; i < N; ++i) w[i].x[3] = product(x[i], factor_0);
  for (int i = 0; i < N; ++i) w[i].x[1] = product(exclusive(upper(w[i].x[3]), keys.round[0][1]), factor_1);
  for (int i = 0; i < N; ++i) {
    const Wide p = product(exclusive(upper(w[i].x[1]), keys.round[1][0]), factor_0);
    const Wide q = product(exclusive(w[i].x[3], keys.second_2), factor_1);
    w[i] = {{exclusive(upper(q), w[i].x[1], keys.round[2][0]), q, exclusive(upper(p), keys.third_2), p}};
  }
#pragma GCC unroll 10
  for (int r = 3; r + 1 < kPhiloxRounds; ++r) {
    Wide p[N], q[N];
    for (int i = 0; i < N; ++i) p[i] = product(w[i].x[0], factor_0), q[i] = product(w[i].x[2], factor_1);
    for (int i = 0; i < N; ++i) {
      w[i] = {{exclusive(upper(q[i]), w[i].x[1], keys.round[r][0]), q[i],
               exclusive(upper(p[i]), w[i].x[3], keys.round[r][1]), p[i]}};
    }
  }
}

#endif

#if defined(GCK_AVX512)

struct RandomWords {
  Wide first, second;
};

template <int N>
GCK_INLINE void random_words(Keys& keys, uint64_t counter, RandomWords (&out)[N]) {
  if (counter >> 32 != keys.high) keys.begin(static_cast<uint32_t>(counter >> 32));
  // In the order that lets the words of counters 0 to 3 come out of one interleaving, and 4 to 7 of the
  // other.
  const Wide lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  Wide x[N];
  for (int i = 0; i < N; ++i)
    x[i] = plus(lane, wide(static_cast<uint32_t>(counter) + 8 * static_cast<uint32_t>(i)));
  Words w[N];
  nine_rounds(x, keys, w);
  const Wide* last = keys.round[kPhiloxRounds - 1];
  // The last round, for two words at once: the upper half of a product, and behind it the lower half.
  const auto pair = [](Wide whole, Wide other, Wide key) {
    return _mm512_mask_ternarylogic_epi32(_mm512_ror_epi64(whole, 32), 0x5555, other, key, 0x96);
  };
  for (int i = 0; i < N; ++i) {
    const Wide front = pair(product(w[i].x[2], wide(kPhiloxFactor[1])), w[i].x[1], last[0]);
    const Wide back = pair(product(w[i].x[0], wide(kPhiloxFactor[0])), w[i].x[3], last[1]);
    out[i] = {_mm512_unpacklo_epi64(front, back), _mm512_unpackhi_epi64(front, back)};
  }
}

inline Wide words_at(const RandomWords& words, int64_t i) { return i ? words.second : words.first; }

#elif defined(GCK_AVX2)

struct RandomWords {
  Wide quarter[4];
};

template <int N>
GCK_INLINE void random_words(Keys& keys, uint64_t counter, RandomWords (&out)[N]) {
  if (counter >> 32 != keys.high) keys.begin(static_cast<uint32_t>(counter >> 32));
  // In the order that lets the words of counters 0 and 1 come out of one interleaving, 2 and 3 of the other.
  const Wide lane = _mm256_setr_epi64x(0, 2, 1, 3);
  const Wide* last = keys.round[kPhiloxRounds - 1];
  // The last round, for two words at once: the upper half of a product, and behind it the lower half.
  const auto pair = [](Wide whole, Wide other, Wide key) {
    const Wide low = _mm256_blend_epi32(_mm256_setzero_si256(), exclusive(other, key), 0x55);
    return exclusive(_mm256_shuffle_epi32(whole, 0xb1), low);
  };
  for (int i = 0; i < N; ++i) {
    const auto at = static_cast<uint32_t>(counter) + 8 * static_cast<uint32_t>(i);
    const Wide x[2] = {plus(lane, wide(at)), plus(lane, wide(at + 4))};
    Words w[2];
    nine_rounds(x, keys, w);
    for (int half = 0; half < 2; ++half) {
      const Wide front = pair(product(w[half].x[2], wide(kPhiloxFactor[1])), w[half].x[1], last[0]);
      const Wide back = pair(product(w[half].x[0], wide(kPhiloxFactor[0])), w[half].x[3], last[1]);
      out[i].quarter[2 * half] = _mm256_unpacklo_epi64(front, back);
      out[i].quarter[2 * half + 1] = _mm256_unpackhi_epi64(front, back);
    }
  }
}

inline Wide words_at(const RandomWords& words, int64_t i) { return words.quarter[i]; }

#else

struct Keys {
  uint64_t seed;
};

struct RandomWords {
  uint32_t x[kDraw];
};

#if defined(GCK_NEON)

// A vector's words are the same one of four counters.
template <int N>
GCK_INLINE void random_words(const Keys& keys, uint64_t counter, RandomWords (&out)[N]) {
  const uint32x4_t lane = {0, 1, 2, 3};
  const auto multiplied = [](uint32x4_t x, uint32_t factor) {
    const uint64x2_t low = vmull_n_u32(vget_low_u32(x), factor), high = vmull_high_n_u32(x, factor);
    return vuzpq_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high));
  };
  for (uint32_t i = 0; i < N * kDraw / 16; ++i) {
    auto key_0 = static_cast<uint32_t>(keys.seed), key_1 = static_cast<uint32_t>(keys.seed >> 32);
    uint32x4x4_t x = {{vaddq_u32(lane, vdupq_n_u32(static_cast<uint32_t>(counter) + 4 * i)),
                       vdupq_n_u32(static_cast<uint32_t>(counter >> 32)), vdupq_n_u32(0), vdupq_n_u32(0)}};
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const uint32x4x2_t p = multiplied(x.val[0], kPhiloxFactor[0]);
      const uint32x4x2_t q = multiplied(x.val[2], kPhiloxFactor[1]);
      x.val[0] = veorq_u32(q.val[1], veorq_u32(x.val[1], vdupq_n_u32(key_0)));
      x.val[1] = q.val[0];
      x.val[2] = veorq_u32(p.val[1], veorq_u32(x.val[3], vdupq_n_u32(key_1)));
      x.val[3] = p.val[0];
      key_0 += kPhiloxKeyStep[0];
      key_1 += kPhiloxKeyStep[1];
    }
    vst4q_u32(out[i / 2].x + 16 * (i % 2), x);
  }
}

#else

template <int N>
inline void random_words(const Keys& keys, uint64_t counter, RandomWords (&out)[N]) {
  for (uint32_t c = 0; c < N * kDraw / 4; ++c) {
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
    std::memcpy(out[c / 8].x + 4 * (c % 8), x, sizeof x);
  }
}

#endif

inline void store_words(uint64_t* p, const RandomWords& words) {
  for (int i = 0; i < kDraw / 2; ++i) p[i] = words.x[2 * i] | static_cast<uint64_t>(words.x[2 * i + 1]) << 32;
}

#endif

#if defined(GCK_AVX512) || defined(GCK_AVX2)
inline void store_words(uint64_t* p, const RandomWords& words) {
  constexpr int64_t each = sizeof(Wide) / 8;
  for (int64_t i = 0; i < kDraw / 2; i += each) store_wide(p + i, words_at(words, i / each));
}
#endif

inline RandomWords random_words(Keys& keys, uint64_t counter) {
  RandomWords words[1];
  random_words(keys, counter, words);
  return words[0];
}

// Sixteen numbers in [0, 2^24), of 64 that sixteen words hold: the upper bits of the words turned left by as
// many bytes as `Turn` says. So each of the 64 has a first byte of its own, and shares the others.
template <int Turn>
inline Vec numbers(const uint64_t* words) {
  static_assert(Turn >= 0 && Turn < 4);
#if defined(GCK_AVX512)
  Wide word = _mm512_load_si512(words);
  if constexpr (Turn >= 2) word = _mm512_rol_epi32(word, 16);
  word = Turn % 2 ? _mm512_and_si512(word, _mm512_set1_epi32(0xffffff)) : _mm512_srli_epi32(word, 8);
  return {_mm512_cvtepi32_ps(word)};
#elif defined(GCK_AVX2)
  const auto eight = [](const uint64_t* four) {
    Wide word = _mm256_load_si256(reinterpret_cast<const Wide*>(four));
    if constexpr (Turn >= 2) word = _mm256_or_si256(_mm256_slli_epi32(word, 16), _mm256_srli_epi32(word, 16));
    word = Turn % 2 ? _mm256_and_si256(word, _mm256_set1_epi32(0xffffff)) : _mm256_srli_epi32(word, 8);
    return _mm256_cvtepi32_ps(word);
  };
  return {eight(words), eight(words + 4)};
#elif defined(GCK_NEON)
  return each([&](int i) {
    uint32x4_t word = vreinterpretq_u32_u64(vld1q_u64(words + 2 * i));
    if constexpr (Turn >= 2) word = vreinterpretq_u32_u16(vrev32q_u16(vreinterpretq_u16_u32(word)));
    word = Turn % 2 ? vandq_u32(word, vdupq_n_u32(0xffffff)) : vshrq_n_u32(word, 8);
    return vcvtq_f32_u32(word);
  });
#else
  return each([&](int i) {
    const auto word = static_cast<uint32_t>(words[i / 2] >> i % 2 * 32);
    const uint32_t turned = Turn ? word << 8 * Turn | word >> (32 - 8 * Turn) : word;
    return static_cast<float>(turned >> 8);
  });
#endif
}

// The words of elements, sixteen for each 64 of them; those of many are made at a time, and kept.
class DrawnWords {
 public:
  explicit DrawnWords(uint64_t seed) : keys_{seed} {}

  // Of the 64 elements of which `element` is one, counted from 0.
  GCK_INLINE const uint64_t* of(int64_t element) {
    const int64_t batch = element / kBatch;
    if (batch != batch_) make(batch);
    return words_ + element % kBatch / 64 * 8;
  }

 private:
  static constexpr int kMade = 4;
  static constexpr int64_t kBatch = kMade * kDraw * 4;

  void make(int64_t batch) {
    RandomWords made[kMade];
    random_words(keys_, static_cast<uint64_t>(batch) * (kMade * kDraw / 4), made);
    for (int i = 0; i < kMade; ++i) store_words(words_ + i * kDraw / 2, made[i]);
    batch_ = batch;
  }

  Keys keys_;
  int64_t batch_ = -1;
  alignas(64) uint64_t words_[kMade * kDraw / 2];
};

}  // namespace gck::GCK_ISA
