// Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): the same numbers on every device, in any
// order.
#pragma once
#include <stdint.h>

#include "rule.h"

namespace sk {

struct PhiloxWords {
  uint32_t first, second, third, fourth;
};

// One of the ten rounds, under keys that move on from round to round.
SK_RULE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(b >> 32) ^ c1 ^ k0;
  c2 = uint32_t(a >> 32) ^ c3 ^ k1;
  c1 = uint32_t(b);
  c3 = uint32_t(a);
}
SK_RULE uint32_t philox_key0(uint64_t key, int round) { return uint32_t(key) + uint32_t(round) * 0x9E3779B9u; }
SK_RULE uint32_t philox_key1(uint64_t key, int round) { return uint32_t(key >> 32) + uint32_t(round) * 0xBB67AE85u; }

// The four words that belong to a counter of 128 bits under a key of 64.
SK_RULE PhiloxWords philox_words(uint64_t key, uint64_t low, uint32_t third, uint32_t fourth) {
  uint32_t c0 = uint32_t(low), c1 = uint32_t(low >> 32), c2 = third, c3 = fourth;
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, philox_key0(key, round), philox_key1(key, round));
  }
  return {c0, c1, c2, c3};
}

// The first of them.
SK_RULE uint32_t philox(uint64_t key, uint64_t low, uint32_t third, uint32_t fourth) {
  return philox_words(key, low, third, fourth).first;
}

}  // namespace sk
