package mqtt

import "unicode/utf8"

// text is what topics and filters come as: a string or the bytes of one.
type text interface{ ~string | ~[]byte }

// What a scan of a text found.
const (
	hasNull = 1 << iota
	hasWildcard
	hasHigh // bytes beyond ASCII: UTF-8 has to be checked
)

func scan[T text](s T) (found uint8) {
	for i := 0; i < len(s); i++ {
		found |= classes[s[i]]
	}
	return found
}

var classes = func() (c [256]uint8) {
	c[0] = hasNull
	c['+'], c['#'] = hasWildcard, hasWildcard
	for i := 0x80; i < 0x100; i++ {
		c[i] = hasHigh
	}
	return c
}()

func validUTF8[T text](s T) bool {
	for i := 0; i < len(s); {
		if s[i] < utf8.RuneSelf {
			i++
			continue
		}
		// a window of four bytes: the conversion stays on the stack
		var w [utf8.UTFMax]byte
		n := copy(w[:], s[i:])
		r, size := utf8.DecodeRune(w[:n])
		if r == utf8.RuneError && size == 1 {
			return false
		}
		i += size
	}
	return true
}

// checkTopic is ValidTopic with the reason.
func checkTopic[T text](topic T) *Error {
	if len(topic) == 0 {
		return errTopicEmpty
	}
	if len(topic) > MaxString {
		return errTextLong
	}
	switch found := scan(topic); {
	case found&hasNull != 0:
		return errNull
	case found&hasHigh != 0 && !validUTF8(topic):
		return errUTF8
	case found&hasWildcard != 0:
		return errTopicWildcard
	}
	return nil
}

// checkText checks a UTF-8 encoded string (MQTT 5.0 §1.5.4).
func checkText[T text](s T) *Error {
	if len(s) > MaxString {
		return errTextLong
	}
	switch found := scan(s); {
	case found&hasNull != 0:
		return errNull
	case found&hasHigh != 0 && !validUTF8(s):
		return errUTF8
	}
	return nil
}

const sharePrefix = "$share/"

func isShared[T text](filter T) bool {
	return len(filter) >= len(sharePrefix) && string(filter[:len(sharePrefix)]) == sharePrefix
}

// checkFilter is ValidFilter with the reason. A nil error may still be a shared subscription.
func checkFilter[T text](filter T) *Error {
	if len(filter) == 0 {
		return errFilterEmpty
	}
	if err := checkText(filter); err != nil {
		return err
	}
	start := 0
	if isShared(filter) {
		i := len(sharePrefix)
		for ; i < len(filter) && filter[i] != '/'; i++ {
			if filter[i] == '+' || filter[i] == '#' {
				return errShareName
			}
		}
		if i == len(sharePrefix) {
			return errShareName
		}
		if i+1 >= len(filter) { // no slash, or no filter after it
			return errShareFilter
		}
		start = i + 1
	}
	for i := start; i < len(filter); i++ {
		switch filter[i] {
		case '#':
			if i != len(filter)-1 || i > start && filter[i-1] != '/' {
				return errFilterHash
			}
		case '+':
			if i > start && filter[i-1] != '/' || i+1 < len(filter) && filter[i+1] != '/' {
				return errFilterPlus
			}
		}
	}
	return nil
}

// ValidTopic says whether topic is a topic name: 1 to 65535 bytes of UTF-8 without
// U+0000 and without wildcards (MQTT 5.0 §4.7).
func ValidTopic[T text](topic T) bool { return checkTopic(topic) == nil }

// ValidFilter says whether filter is a topic filter, also of a shared subscription
// ($share/{name}/{filter}, MQTT 5.0 §4.8.2; taken as one for 3.1.1 too). A filter that
// begins with "$share" in other letters is an ordinary one.
func ValidFilter[T text](filter T) bool { return checkFilter(filter) == nil }

// SplitShared takes a valid filter apart: the name and the filter proper of a shared
// subscription. For an ordinary filter ok is false and inner is filter.
func SplitShared(filter string) (name, inner string, ok bool) {
	if !isShared(filter) {
		return "", filter, false
	}
	rest := filter[len(sharePrefix):]
	for i := 0; i < len(rest); i++ {
		if rest[i] == '/' {
			return rest[:i], rest[i+1:], true
		}
	}
	return "", filter, false
}

// Match says whether topic falls under filter. Both must be valid; filter is without its
// $share part. Wildcards at the start do not match a topic that begins with $
// (MQTT-4.7.2-1), and "a/#" matches "a" too (MQTT 5.0 §4.7.1.2).
func Match[F, T text](filter F, topic T) bool {
	if len(filter) == 0 || len(topic) == 0 {
		return false
	}
	if topic[0] == '$' && (filter[0] == '+' || filter[0] == '#') {
		return false
	}
	f, t := 0, 0
	for {
		// here f and t both stand at the start of a level
		if f < len(filter) && filter[f] == '#' {
			return true
		}
		if f < len(filter) && filter[f] == '+' {
			f++
			for t < len(topic) && topic[t] != '/' {
				t++
			}
		} else {
			for f < len(filter) && t < len(topic) && filter[f] != '/' && filter[f] == topic[t] {
				f++
				t++
			}
		}
		fEnd, tEnd := f >= len(filter), t >= len(topic)
		switch {
		case fEnd || tEnd:
			if fEnd && tEnd {
				return true
			}
			// "a/#" and "a": the parent level itself
			return tEnd && f+2 == len(filter) && filter[f] == '/' && filter[f+1] == '#'
		case filter[f] != '/' || topic[t] != '/':
			return false
		}
		f++
		t++
	}
}
